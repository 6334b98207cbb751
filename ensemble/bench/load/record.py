"""What a load test leaves behind: frozen records. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadRun:
    """One run of LoadGen. Latencies count from the scheduled arrival, of answered requests.

    A percentile is None where there are too few requests for it, as is all else that is unknown.
    """

    purpose: str  # search, confirm, curve; asked: the rate or the scenario was given
    offered_qps: float | None  # None where the scenario offers no rate
    seed: int
    seconds: float
    requests: int
    answered: int
    refused: int
    failed: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    tail_s: float | None  # at the requested percentile
    longest_s: float | None
    valid: bool  # by LoadGen's rules
    why_not: str | None
    problem: str | None = None  # why the case fails: a forward raised, or answers were wrong
    mean_batch: float | None = None
    wasted_share: float | None = None  # of the computed images, those that were padding
    cpu_s_per_request: float | None = None
    overhead_s: float | None = None  # per request: time of this program outside of the forwards
    most_waiting: int | None = None  # maximum queue length
    memory_growth_bytes: int | None = None  # of the process, after its first second of serving
    late_issue_s: float | None = None  # maximum issue delay of LoadGen

    @property
    def rate_qps(self) -> float | None:
        """The offered rate; the achieved one where the scenario offers none."""
        if self.offered_qps is not None:
            return self.offered_qps
        return self.answered / self.seconds if self.seconds else None


@dataclass(frozen=True)
class LoadTest:
    """The runs of one process. `percentile` is 0 to 100; only `server` has a latency bound."""

    scenario: str
    percentile: float
    bound_s: float | None
    runs: tuple[LoadRun, ...]

    @property
    def shown(self) -> LoadRun | None:
        """The run that the table shows: the fastest valid one that was confirmed or asked for; the
        last of those where none is valid."""
        counted = [run for run in self.runs if run.purpose in ("confirm", "asked")] or self.runs
        valid = [run for run in counted if run.valid]
        if valid:
            return max(valid, key=lambda run: run.rate_qps or 0.0)
        return counted[-1] if counted else None

    @property
    def held_qps(self) -> float | None:
        """The sustained rate in requests per second; None where no run is valid."""
        shown = self.shown
        return shown.rate_qps if shown is not None and shown.valid else None


def middle(tests: Sequence[LoadTest]) -> LoadTest | None:
    """The test with the median sustained rate, the lower of two; None where there is none."""
    ordered = sorted(tests, key=lambda test: test.held_qps or 0.0)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def held_range(tests: Sequence[LoadTest]) -> tuple[float, float] | None:
    """The lowest and the highest sustained rate; None unless every test sustained one."""
    held = [test.held_qps for test in tests if test.held_qps is not None]
    return (min(held), max(held)) if held and len(held) == len(tests) else None
