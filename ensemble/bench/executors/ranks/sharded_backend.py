"""The backend of a setup that is sharded over all ranks: build, call, explain, float64 logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.case import REFERENCE, Case
from ensemble.bench.executors.ranks import environment_check
from ensemble.bench.executors.ranks.environment_check import RankInfo
from ensemble.bench.executors.ranks.leader import Leader
from ensemble.bench.executors.ranks.rank_reports import CallProfile, RankReport
from ensemble.bench.executors.ranks.rank_worker import strategy_key
from ensemble.bench.measurement import Note, RankTimes
from ensemble.bench.setup import Backend
from ensemble.errors import UnavailableError, first_line
from ensemble.machine.dtypes import NumericFormat


class RankStepError(RuntimeError):
    """A step failed on a rank; the message is the reason."""


def make_backend(leader: Leader, example: Tensor, reduce: str) -> Backend:
    """The backend of the setup that all ranks are configured for; `example` is rank 0's."""
    host = leader.ranks[0].host
    return Backend(
        build=lambda name, numbers: _build(leader, name, example, numbers, reduce),
        explain=lambda error, name, numbers: _explain(error),
        float64_logits=lambda: _float64_logits(leader, example),
        rank_times=lambda built, case: _rank_times(leader, built, case),
        call_error=lambda name, dtype: _call_error(leader, name, dtype),
        own_processes=tuple(info.pid for info in leader.ranks[1:] if info.host == host),
    )


def failure_reason(reports: Sequence[RankReport], ranks: Sequence[RankInfo]) -> str:
    """Why a step failed on some rank, with its name; empty if it did not."""
    return _first_reason([report.error for report in reports], ranks)


def _build(
    leader: Leader, name: str, example: Tensor, numbers: NumericFormat, reduce: str
) -> BuiltStrategy:
    """A strategy built on all ranks. Times and memory are the maximum over ranks."""
    worker = leader.worker
    reports: list[RankReport] = leader.run_step(worker.build, name, numbers.name, example=example)
    reason = failure_reason(reports, leader.ranks)
    if reason:
        unavailable = any(report.status == "unavailable" for report in reports)
        raise UnavailableError(reason) if unavailable else RankStepError(reason)
    key, own_example = strategy_key(name, numbers.name), example.to(numbers.dtype)

    def call(x: Tensor, reduce: str) -> Tensor:
        output = worker.call(key, reduce, x=x)
        assert output is not None  # this is rank 0
        return output

    def forward(x: Tensor) -> Tensor:
        leader.announce_call(key, "none")
        return call(x, "none")

    return BuiltStrategy(
        forward=forward,
        timed_forward=lambda x: call(x, reduce),
        example=own_example,
        logits=forward(own_example),
        build_s=max(report.build_s for report in reports),
        first_call_s=max(report.first_call_s for report in reports),
        peak_memory_bytes=_largest(report.peak_memory_bytes for report in reports),
        peak_reserved_bytes=_largest(report.peak_reserved_bytes for report in reports),
        held_bytes=_largest(report.held_bytes for report in reports),
        bytes_per_model=_largest(report.bytes_per_model for report in reports),
        choice=reports[0].choice,
        notes=_notes(reports),
        ready=lambda: leader.announce_call(key, reduce),
        numbers=numbers,
    )


def _largest(values: Iterable[int | None]) -> int | None:
    """The largest known value."""
    return max((value for value in values if value is not None), default=None)


def _notes(reports: Sequence[RankReport]) -> tuple[Note, ...]:
    """The notes of all ranks, each once; with its ranks if not all ranks have it."""
    all_notes = dict.fromkeys(note for report in reports for note in report.notes)
    notes = []
    for note in all_notes:
        ranks = [rank for rank, report in enumerate(reports) if note in report.notes]
        prefix = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
        notes.append(note if len(ranks) == len(reports) else replace(note, text=prefix + note.text))
    return tuple(notes)


def _float64_logits(leader: Leader, example: Tensor) -> Tensor:
    parts: list[Tensor | str] = leader.run_step(leader.worker.float64_logits, example=example)
    reason = _first_reason([part if isinstance(part, str) else "" for part in parts], leader.ranks)
    if reason:
        raise RankStepError(reason)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _call_error(leader: Leader, name: str, dtype: str) -> str:
    """Why a call of a strategy failed on a rank, with its name; empty if none did."""
    errors: list[str] = leader.run_step(leader.worker.call_errors, strategy_key(name, dtype))
    return _first_reason(errors, leader.ranks)


def _rank_times(
    leader: Leader, built: BuiltStrategy, case: Case
) -> tuple[RankTimes, tuple[str, ...]]:
    """The parts of a call, and notes.

    Raises:
        RankStepError: a timed call failed on a rank.
    """
    name = REFERENCE if case.is_self_check else case.strategy
    key = strategy_key(name, case.dtype)
    profiles: list[CallProfile] = leader.run_step(leader.worker.profile_call, key, x=built.example)
    reason = _first_reason([profile.error for profile in profiles], leader.ranks)
    if reason:
        raise RankStepError(reason)
    times = RankTimes(
        whole_s=profiles[0].whole_s,
        forward_s=_slowest([profile.forward_s for profile in profiles]),
        alone_s=_slowest([profile.alone_s for profile in profiles]),
        one_rank_s=profiles[0].one_rank_s,
    )
    return times, profiles[0].notes


def _slowest(times: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The slowest rank of each round."""
    return tuple(map(max, zip(*times, strict=True)))


def _first_reason(reasons: Sequence[str], ranks: Sequence[RankInfo]) -> str:
    """The first reason, with its rank unless all ranks have the same."""
    first = next((rank for rank, reason in enumerate(reasons) if reason), None)
    if first is None:
        return ""
    same = len(set(reasons)) == 1
    return (
        reasons[first]
        if same
        else f"{environment_check.rank_name(first, ranks[first])}: {reasons[first]}"
    )


def _explain(error: Exception) -> str:
    if isinstance(error, RankStepError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
