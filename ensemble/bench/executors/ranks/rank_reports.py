"""What each rank reports after a step; gathered on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.bench.measurement import Note
from ensemble.strategies.build_result import Choice


@dataclass(frozen=True)
class RankReport:
    """The result of a build or setup step on one rank; `status` as in `Measurement`."""

    status: str = "ok"
    error: str = ""
    build_s: float = 0.0
    first_call_s: float = 0.0
    peak_memory_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    held_bytes: int | None = None
    bytes_per_model: int | None = None
    notes: tuple[Note, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class CallProfile:
    """The times of the rounds of `profile_call` on one rank, in seconds.

    The fields are those of `measurement.RankTimes`, of this rank; `error` is set if a call failed.
    """

    whole_s: tuple[float, ...]
    forward_s: tuple[float, ...]
    alone_s: tuple[float, ...]
    one_rank_s: tuple[float, ...]
    notes: tuple[str, ...]
    error: str


def any_failed(reports: Sequence[RankReport]) -> bool:
    """Has a step failed on some rank?"""
    return any(report.status != "ok" for report in reports)
