"""The records of a load test. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.statistics import between_process_interval


@dataclass(frozen=True)
class LoadRun:
    """One run of LoadGen. Latencies count from the scheduled arrival, of answered requests.

    A percentile is None if there are too few requests to estimate it.
    """

    purpose: str  # search, confirm, curve; asked: requested rate or scenario
    offered_qps: float | None  # None if the scenario offers no rate
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
    problem: str | None = None  # why the case fails: a forward raised, or an answer was wrong
    mean_batch: float | None = None
    wasted_share: float | None = None  # of the computed images, those that were padding
    cpu_s_per_request: float | None = None
    overhead_s: float | None = None  # per request: time of this program outside of the forwards
    most_waiting: int | None = None  # maximum queue length
    memory_growth_bytes: int | None = None  # of the process, after its first second of serving
    late_issue_s: float | None = None  # maximum issue delay of LoadGen
    late: int | None = None  # requests later than the bound, refused or failed; None if no bound

    @property
    def rate_qps(self) -> float | None:
        """The offered rate; the achieved one if the scenario offers none."""
        if self.offered_qps is not None:
            return self.offered_qps
        return self.answered / self.seconds if self.seconds else None


@dataclass(frozen=True)
class RateEstimate:
    """A sustained rate in requests per second, with its 95 % confidence interval."""

    qps: float
    low_qps: float
    high_qps: float


@dataclass(frozen=True)
class LoadTest:
    """The runs of one process. `percentile` is 0 to 100; only `server` has a latency bound.

    `estimate` is the sustained rate of a search; in files of earlier versions the highest rate that
    was confirmed.
    """

    scenario: str
    percentile: float
    bound_s: float | None
    runs: tuple[LoadRun, ...]
    estimate: RateEstimate | None = None

    @property
    def reported_run(self) -> LoadRun | None:
        """The run in the table: the one nearest to the estimated rate; without an estimate the
        fastest valid one that was confirmed or requested, or the last of those if none is valid."""
        if self.estimate is not None:
            qps = self.estimate.qps
            return min(self.runs, key=lambda run: abs((run.offered_qps or 0.0) - qps))
        counted = [run for run in self.runs if run.purpose in ("confirm", "asked")] or self.runs
        valid = [run for run in counted if run.valid]
        if valid:
            return max(valid, key=lambda run: run.rate_qps or 0.0)
        return counted[-1] if counted else None

    @property
    def sustained_qps(self) -> float | None:
        """The sustained rate in requests per second; None if no run is valid."""
        if self.estimate is not None:
            return self.estimate.qps
        run = self.reported_run
        return run.rate_qps if run is not None and run.valid else None


def median_test(tests: Sequence[LoadTest]) -> LoadTest | None:
    """The test with the median sustained rate, the lower of two; None if there is none."""
    ordered = sorted(tests, key=lambda test: test.sustained_qps or 0.0)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def sustained_interval(tests: Sequence[LoadTest]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the sustained rate: over processes, or of the one test.

    None unless every test sustained a rate.
    """
    rates = [test.sustained_qps for test in tests if test.sustained_qps is not None]
    if not rates or len(rates) < len(tests):
        return None
    if len(tests) > 1:
        return between_process_interval(rates)
    found = tests[0].estimate
    return (found.low_qps, found.high_qps) if found else None
