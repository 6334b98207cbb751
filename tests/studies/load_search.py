"""Simulate searches of the sustained rate of an M/D/1 queue, and write load_search.md.

`python -m tests.studies.load_search` takes some minutes. The search is the program's; instead of
LoadGen and a server, Lindley's recursion gives the latencies of each run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np

from ensemble.bench.load.batching import SINGLE_TENANT, BatchPlan
from ensemble.bench.load.load_tester import MIN_RUN_BOUNDS
from ensemble.bench.load.queue_simulation import Queueing, late_curve
from ensemble.bench.load.record import RateEstimate
from ensemble.bench.load.search import LATE_REQUESTS, LateCurve, Outcome, search_rate
from ensemble.statistics import between_process_interval, median, queries_needed

PAGE = Path(__file__).with_name("load_search.md")
PROCESSES = 3
SEARCHES = 600
LONG = 4_000_000  # requests of the run that the true rate is derived from
MIN_SECONDS = 2.0  # --min_seconds


@dataclass(frozen=True)
class System:
    """An M/D/1 queue, and what is asked of it.

    measured_as: the time of its batch plan, as measured, over the true one.
    """

    service_s: float
    bound_s: float
    percentile: float
    measured_as: float = 1.0

    def requests_at(self, rate_qps: float) -> int:
        fewest = queries_needed(self.percentile / 100, LATE_REQUESTS)
        return max(fewest, ceil(max(MIN_SECONDS, MIN_RUN_BOUNDS * self.bound_s) * rate_qps))


def latencies_s(rate_qps: float, count: int, service_s: float, seed: object) -> np.ndarray:
    """Latencies of requests that find the queue as the ones before left it (Lindley, 1952)."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_qps, count)  # type: ignore[arg-type]
    gaps[0] = service_s
    walk = np.cumsum(service_s - gaps)
    waits: np.ndarray = walk - np.minimum.accumulate(walk)
    return waits + service_s


@cache
def true_rate(system: System) -> float:
    """The rate at which the percentile meets the bound in a very long run."""
    low, high = 0.0, 1 / system.service_s
    for _ in range(18):
        middle = (low + high) / 2
        late = latencies_s(middle, LONG, system.service_s, 1) > system.bound_s
        low, high = (middle, high) if late.mean() <= 1 - system.percentile / 100 else (low, middle)
    return (low + high) / 2


@cache
def curve_of(system: System) -> LateCurve:
    plan = BatchPlan(SINGLE_TENANT, 1, system.service_s * system.measured_as)
    queueing = Queueing((plan,), (1.0,), 1, 0.0, system.bound_s)
    return late_curve(queueing, percentile=system.percentile, requests_at=system.requests_at)


def searched(system: System, seed: int) -> tuple[RateEstimate, int]:
    """The estimate of one search, and how many requests it took."""
    asked = list[int]()

    def run(rate_qps: float, trial: int) -> Outcome:
        asked.append(system.requests_at(rate_qps))
        found = latencies_s(rate_qps, asked[-1], system.service_s, (seed, trial))
        return Outcome(rate_qps, asked[-1], int((found > system.bound_s).sum()))

    estimate = search_rate(run, curve_of(system))
    assert estimate is not None
    return estimate, sum(asked)


@dataclass(frozen=True)
class Found:
    """Estimated over true rate: of a row (median of its processes) and of one search; and how often
    either interval covers the truth."""

    mean: float
    low: float
    high: float
    covered: float
    covered_by_one: float
    requests: float  # of one search


def study(system: System, searches: int) -> Found:
    truth = true_rate(system)
    found = [searched(system, seed) for seed in range(searches)]
    rows = [
        [estimate.qps / truth for estimate, _ in found[at : at + PROCESSES]]
        for at in range(0, searches - PROCESSES + 1, PROCESSES)
    ]
    figures = [median(row) or 0.0 for row in rows]
    intervals = [between_process_interval(row) or (0.0, 0.0) for row in rows]
    least, most = map(float, np.percentile(figures, (2.5, 97.5)))
    return Found(
        float(np.mean(figures)),
        least,
        most,
        float(np.mean([low <= 1 <= high for low, high in intervals])),
        float(np.mean([one.low_qps <= truth <= one.high_qps for one, _ in found])),
        float(np.mean([requests for _, requests in found])),
    )


def lines(searches: int) -> Iterator[str]:
    """The page, line by line."""
    yield "# The search for the sustained rate under simulation"
    yield ""
    yield (
        "`python -m tests.studies.load_search` wrote this page: an M/D/1 queue,"
        f" {searches} searches per line, rows of {PROCESSES} processes; found over true rate."
    )
    yield ""
    yield (
        "| percentile, bound | mean | 95 % of rows | the row's interval covers | that of one search"
        " covers | requests per search |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    systems = {
        f"p{percentile:g}, {bound} service times": System(0.01, bound * 0.01, percentile)
        for percentile in (90.0, 99.0)
        for bound in (4, 20)
    }
    systems["p99, 4 service times; plans measured 10 % too slow"] = System(0.01, 0.04, 99.0, 1.1)
    systems["p99, 4 service times; plans measured 10 % too fast"] = System(0.01, 0.04, 99.0, 0.9)
    for name, system in systems.items():
        found = study(system, searches)
        yield (
            f"| {name} | {found.mean:.3f} | {found.low:.2f}-{found.high:.2f} | {found.covered:.3f}"
            f" | {found.covered_by_one:.3f} | {found.requests:,.0f} |"
        )
    yield ""
    fast, slow = System(0.0085, 0.2, 99.0), System(0.039, 0.2, 99.0)
    ratio = true_rate(fast) / true_rate(slow)
    ratios = [
        searched(fast, seed)[0].qps / searched(slow, seed)[0].qps / ratio
        for seed in range(searches // 2)
    ]
    yield (
        f"Two servers of 8.5 and 39 ms under p99 of 200 ms: true ratio {ratio:.2f}, found over true"
        f" {np.mean(ratios):.3f}, 95 % of pairs {np.percentile(ratios, 2.5):.2f}-"
        f"{np.percentile(ratios, 97.5):.2f}."
    )


def main(show: Callable[[str], None] = print) -> None:
    """Write the page, and show it as it grows."""
    text = []
    for line in lines(int(sys.argv[1]) if len(sys.argv) > 1 else SEARCHES):
        show(line)
        text.append(line)
    PAGE.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
