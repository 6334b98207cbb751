"""The backend of a cell that is spread over all ranks: build, call, explain, float64 logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.case import REFERENCE, Case
from ensemble.bench.executors.ranks import environment_check
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.leader import Leader
from ensemble.bench.executors.ranks.member import key_of
from ensemble.bench.executors.ranks.outcomes import Division, Outcome
from ensemble.bench.measurement import Note, RankTimes
from ensemble.bench.setup import Backend
from ensemble.errors import UnavailableError, first_line


class RowError(RuntimeError):
    """A rank could not do its part of a row; its text is the reason."""


def of_ranks(leader: Leader, example: Tensor, reduce: str) -> Backend:
    """The backend of a cell that is open on all ranks; `example` is rank 0's."""
    host = leader.ranks[0].host
    return Backend(
        build=lambda name, dtype: _build(leader, name, example, dtype, reduce),
        explain=lambda error, name, dtype: _explain(error),
        float64_logits=lambda: _float64_logits(leader, example),
        rank_times=lambda built, case: _rank_times(leader, built, case),
        own_processes=tuple(facts.pid for facts in leader.ranks[1:] if facts.host == host),
    )


def problem(outcomes: Sequence[Outcome], ranks: Sequence[Facts]) -> str:
    """Why a step has failed on some rank, by its name; on none: empty."""
    return _named([outcome.error for outcome in outcomes], ranks)


def _build(
    leader: Leader, name: str, example: Tensor, dtype: torch.dtype, reduce: str
) -> BuiltStrategy:
    """A strategy built on all ranks. Times and memory are the maximum over ranks."""
    member, kind = leader.member, str(dtype).removeprefix("torch.")
    outcomes: list[Outcome] = leader.all(member.build, name, kind, example=example)
    reason = problem(outcomes, leader.ranks)
    if reason:
        unavailable = any(outcome.status == "unavailable" for outcome in outcomes)
        raise UnavailableError(reason) if unavailable else RowError(reason)
    key, own_example = key_of(name, kind), example.to(dtype)

    def call(x: Tensor, how: str) -> Tensor:
        served = member.call(key, how, x=x)
        assert served is not None  # this is rank 0
        return served

    def forward(x: Tensor) -> Tensor:
        leader.announce_call(key, "none")
        return call(x, "none")

    peaks = [
        outcome.peak_memory_bytes for outcome in outcomes if outcome.peak_memory_bytes is not None
    ]
    return BuiltStrategy(
        forward=forward,
        serve=lambda x: call(x, reduce),
        example=own_example,
        logits=forward(own_example),
        build_s=max(outcome.build_s for outcome in outcomes),
        first_call_s=max(outcome.first_call_s for outcome in outcomes),
        peak_memory_bytes=max(peaks, default=None),
        choice=outcomes[0].choice,
        notes=_notes(outcomes),
        ready=lambda: leader.announce_call(key, reduce),
    )


def _notes(outcomes: Sequence[Outcome]) -> tuple[Note, ...]:
    """The notes of all ranks, each once; with its ranks where not all have it."""
    every = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    notes = []
    for note in every:
        ranks = [rank for rank, outcome in enumerate(outcomes) if note in outcome.notes]
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
        notes.append(note if len(ranks) == len(outcomes) else replace(note, text=who + note.text))
    return tuple(notes)


def _float64_logits(leader: Leader, example: Tensor) -> Tensor:
    parts: list[Tensor | str] = leader.all(leader.member.float64_logits, example=example)
    reason = _named([part if isinstance(part, str) else "" for part in parts], leader.ranks)
    if reason:
        raise RowError(reason)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _rank_times(
    leader: Leader, built: BuiltStrategy, case: Case
) -> tuple[RankTimes, tuple[str, ...]]:
    """The parts of a call, with notes.

    Raises:
        RowError: a timed call has failed on a rank.
    """
    name = REFERENCE if case.is_self_check else case.strategy
    key = key_of(name, case.dtype)
    found: list[Division] = leader.all(leader.member.divide, key, x=built.example)
    reason = _named([division.failed for division in found], leader.ranks)
    if reason:
        raise RowError(reason)
    times = RankTimes(
        whole_s=found[0].whole_s,
        forward_s=_slowest([division.forward_s for division in found]),
        alone_s=_slowest([division.alone_s for division in found]),
        one_rank_s=found[0].one_rank_s,
    )
    return times, found[0].notes


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


def _explain(error: Exception) -> str:
    if isinstance(error, RowError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
