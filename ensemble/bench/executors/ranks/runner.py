"""A cell over all ranks as the measuring of rows knows it: start, call, reason, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ensemble.bench.build import Started
from ensemble.bench.config import Config
from ensemble.bench.executors.ranks import environment_check
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.member import key_of
from ensemble.bench.executors.ranks.outcomes import Division, Outcome
from ensemble.bench.records import REFERENCE, Result
from ensemble.bench.setup import Runner
from ensemble.errors import UnavailableError, first_line

if TYPE_CHECKING:
    from ensemble.bench.executors.ranks.leader import Lead


class RowError(RuntimeError):
    """A rank could not do its part of a row; its text is the reason."""


def of_ranks(lead: Lead, example: Tensor, config: Config) -> Runner:
    """The runner of a cell that is open on all ranks; `example` is rank 0's."""
    host = lead.ranks[0].host
    return Runner(
        start=lambda name, dtype: _start(lead, name, example, dtype, config.reduce),
        reason=lambda error, name, dtype: _reason(error),
        exact=lambda: _exact(lead, example),
        finish=lambda started, row: _divided(lead, started, row),
        beside=tuple(facts.pid for facts in lead.ranks[1:] if facts.host == host),
    )


def problem(outcomes: Sequence[Outcome], ranks: Sequence[Facts]) -> str:
    """Why a step has failed on some rank, by its name; on none: empty."""
    return _named([outcome.error for outcome in outcomes], ranks)


def _start(lead: Lead, name: str, example: Tensor, dtype: torch.dtype, reduce: str) -> Started:
    """A strategy started on all ranks. Times and memory are those of the rank that took most."""
    member, kind = lead.member, str(dtype).removeprefix("torch.")
    outcomes: list[Outcome] = lead.all(member.build, name, kind, example=example)
    reason = problem(outcomes, lead.ranks)
    if reason:
        unavailable = any(outcome.status == "unavailable" for outcome in outcomes)
        raise UnavailableError(reason) if unavailable else RowError(reason)
    key, own_example = key_of(name, kind), example.to(dtype)

    def call(x: Tensor, how: str) -> Tensor:
        served = member.call(key, how, x=x)
        assert served is not None  # this is rank 0
        return served

    def forward(x: Tensor) -> Tensor:
        lead.announce_call(key, "none")
        return call(x, "none")

    peaks = [
        outcome.peak_memory_bytes for outcome in outcomes if outcome.peak_memory_bytes is not None
    ]
    return Started(
        forward=forward,
        serve=lambda x: call(x, reduce),
        example=own_example,
        logits=forward(own_example),
        build_s=max(outcome.build_s for outcome in outcomes),
        first_call_s=max(outcome.first_call_s for outcome in outcomes),
        peak_memory_bytes=max(peaks, default=None),
        choice=outcomes[0].choice,
        notes=_notes(outcomes),
        ready=lambda: lead.announce_call(key, reduce),
    )


def _notes(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Those of all ranks once; of one that not all have, whose it is."""
    every = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    notes = []
    for note in every:
        ranks = [rank for rank, outcome in enumerate(outcomes) if note in outcome.notes]
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
        notes.append(note if len(ranks) == len(outcomes) else who + note)
    return tuple(notes)


def _exact(lead: Lead, example: Tensor) -> Tensor:
    parts: list[Tensor | str] = lead.all(lead.member.exact, example=example)
    reason = _named([part if isinstance(part, str) else "" for part in parts], lead.ranks)
    if reason:
        raise RowError(reason)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _divided(lead: Lead, started: Started, row: Result) -> Result:
    """The row with what its calls consist of.

    Raises:
        RowError: a timed call has failed on a rank.
    """
    kind = row.case.dtype
    name = REFERENCE if row.case.is_self_check else row.case.strategy
    key = key_of(name, kind)
    found: list[Division] = lead.all(lead.member.divide, key, x=started.example)
    reason = _named([division.failed for division in found], lead.ranks)
    if reason:
        raise RowError(reason)
    process = replace(
        row.processes[0],
        whole_s=found[0].whole_s,
        forward_s=_slowest([division.forward_s for division in found]),
        alone_s=_slowest([division.alone_s for division in found]),
        one_rank_s=found[0].one_rank_s,
    )
    return replace(row, processes=(process,), notes=row.notes + found[0].notes)


def _slowest(times: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Of each round the rank that took longest."""
    return tuple(map(max, zip(*times, strict=True)))


def _named(reasons: Sequence[str], ranks: Sequence[Facts]) -> str:
    """The first reason, with its rank where not all have the same."""
    first = next((rank for rank, reason in enumerate(reasons) if reason), None)
    if first is None:
        return ""
    same = len(set(reasons)) == 1
    return (
        reasons[first]
        if same
        else f"{environment_check.name(first, ranks[first])}: {reasons[first]}"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, RowError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
