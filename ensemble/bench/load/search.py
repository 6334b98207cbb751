"""Search the sustained rate: the one at which as many requests are late as the percentile allows.

Neither the highest rate that passed nor the lowest that failed estimates it: with few requests, a
test of each rate is biased downward by its confidence, and the maximum of several is biased upward.
Here all runs count together: a simulation of the queue, with the measured times of the batch plans,
says how the share of late requests grows with the rate, and one number, the capacity relative to
that of the simulation, is fitted to the late requests of all runs. Pure: runs are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from ensemble.bench.config import LoadOptions
from ensemble.bench.load.record import RateEstimate
from ensemble.statistics import LogMean, queries_needed

LATE_REQUESTS = 2  # allowed per run: a run issues as many requests as the percentile then needs
RUNS, MAX_RUNS = 6, 12  # more than RUNS where fewer than MIN_RUNS_LATE had a late request
MIN_RUNS_LATE = 3
SPREAD = (1.0, 1.07, 0.93)  # of the rates of successive runs around the estimate
MAX_CHANGE = 0.2  # of the logarithm of the capacity, from one run to the next
STEP = 0.1  # of it while no request, or every request, is late
# A typical search of a row: its runs, and two for the latency curve below the sustained rate.
TYPICAL_RUNS = RUNS + 2
EXAMPLE_QPS = 10.0
_LIMIT, _HALVINGS = 3.0, 60  # of the logarithm of the capacity; bisections of it


def announcement(load_options: LoadOptions, min_seconds: float) -> str:
    """How long a search will take, and what makes it shorter."""
    requests = queries_needed(load_options.latency_percentile / 100, LATE_REQUESTS)
    minutes = TYPICAL_RUNS * max(requests / EXAMPLE_QPS, min_seconds) / 60
    p90_requests = queries_needed(0.9, LATE_REQUESTS)
    return (
        f"Searching the sustained rate takes about {TYPICAL_RUNS} runs per row, each of at least"
        f" {requests} requests and {min_seconds:g} s: about {minutes:.0f} minutes at"
        f" {EXAMPLE_QPS:g} requests per second. Faster: --latency_percentile 90 ({p90_requests}"
        " requests), or --target_qps (one run)"
    )


@dataclass(frozen=True)
class Outcome:
    """A run at a rate: its requests, and how many were later than the bound, or refused."""

    rate_qps: float
    requests: int
    late: int


@dataclass(frozen=True)
class LateCurve:
    """Simulated shares of late requests, by rate, of runs as long as the real ones.

    `sustained_qps` is the rate at which a long run has the share that the percentile allows.
    """

    rates_qps: tuple[float, ...]
    shares: tuple[float, ...]
    sustained_qps: float

    def share(self, rates_qps: np.ndarray) -> np.ndarray:
        """Interpolated linearly in the logarithm of the rate and the logit of the share."""
        shares = np.clip(np.maximum.accumulate(self.shares), 1e-7, 1 - 1e-7)
        logits = np.interp(np.log(rates_qps), np.log(self.rates_qps), np.log(shares / (1 - shares)))
        found: np.ndarray = 1 / (1 + np.exp(-logits))
        return found


def search_rate(run: Callable[[float, int], Outcome], curve: LateCurve) -> RateEstimate | None:
    """Run at rates around the sustained one, and estimate it; None if no rate limits the server.

    run: (rate, trial) -> outcome; each trial has arrivals of its own.
    """
    outcomes: list[Outcome] = []
    capacity = 0.0  # logarithm, relative to the simulated one
    for trial in range(MAX_RUNS):
        is_known = fit_capacity(curve, outcomes) is not None
        if trial >= RUNS and is_known and sum(one.late > 0 for one in outcomes) >= MIN_RUNS_LATE:
            break
        spread = SPREAD[trial % len(SPREAD)]
        outcomes.append(run(curve.sustained_qps * exp(capacity) * spread, 1 + trial))
        found = fit_capacity(curve, outcomes)
        if found is None:
            capacity += STEP if not outcomes[-1].late else -STEP
        else:
            capacity += min(max(found - capacity, -MAX_CHANGE), MAX_CHANGE)
    return estimate(curve, outcomes)


def estimate(curve: LateCurve, outcomes: Sequence[Outcome]) -> RateEstimate | None:
    """The sustained rate, with its interval: a jackknife over runs, whose arrivals are independent.

    None if no request was late, or every one. Requests within a run are not independent: they share
    bursts. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
    """
    capacity, count = fit_capacity(curve, outcomes), len(outcomes)
    if capacity is None:
        return None
    without = [
        fit_capacity(curve, [*outcomes[:index], *outcomes[index + 1 :]]) for index in range(count)
    ]
    parts = np.array([capacity if one is None else one for one in without])
    variance = (count - 1) / count * float(((parts - parts.mean()) ** 2).sum())
    rate = LogMean(log(curve.sustained_qps) + capacity, variance, max(1, count - 1))
    return RateEstimate(exp(rate.mean), *rate.interval())


def fit_capacity(curve: LateCurve, outcomes: Sequence[Outcome]) -> float | None:
    """The logarithm of the capacity for which the curve expects as many late requests, of all runs
    together, as there were; None if none or all were late."""
    late = sum(one.late for one in outcomes)
    requests = np.array([one.requests for one in outcomes])
    if not 0 < late < requests.sum():
        return None
    rates = np.array([one.rate_qps for one in outcomes])

    def expected(capacity: float) -> float:
        return float((requests * curve.share(rates * exp(-capacity))).sum())

    low, high = -_LIMIT, _LIMIT  # a larger capacity has fewer late requests
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > late else (low, middle)
    return (low + high) / 2
