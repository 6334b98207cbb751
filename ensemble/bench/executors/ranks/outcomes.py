"""What came of a step on one rank, as it is told to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.bench.measurement import Note
from ensemble.strategies.build_result import Choice


@dataclass(frozen=True)
class Outcome:
    """What came of a step on one rank; `status` as in `Measurement`."""

    status: str = "ok"
    error: str = ""
    build_s: float = 0.0
    first_call_s: float = 0.0
    peak_memory_bytes: int | None = None
    notes: tuple[Note, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class Division:
    """What the rounds of `divide` took on one rank, in seconds; `failed` is why a call did."""

    whole_s: tuple[float, ...]
    forward_s: tuple[float, ...]
    alone_s: tuple[float, ...]
    one_rank_s: tuple[float, ...]
    notes: tuple[str, ...]
    failed: str


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Has a step failed on some rank?"""
    return any(outcome.status != "ok" for outcome in outcomes)
