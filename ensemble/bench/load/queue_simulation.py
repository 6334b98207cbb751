"""A discrete-event simulation of the request queue and the batcher: how late requests depend on the
rate.

The search begins with it; LoadGen's runs decide. Tests compare the simulation with queueing theory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.bench.load.batching import (
    BatchPlan,
    dispatch_time_s,
    next_batch,
    peak_throughput_qps,
)
from ensemble.bench.load.request_queue import Request, RequestQueue
from ensemble.bench.load.search import LateCurve

BISECTIONS = 10
# Late requests of a simulated run in which the empty queue at its start does not count, and of all
# runs at a rate of the curve, at the share that the percentile allows; requests in either at most.
LONG_LATE, CURVE_LATE = 6000, 4000
MAX_LONG, MAX_PER_RATE = 200_000, 80_000
CURVE_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.86, 0.92, 0.96, 1.0, 1.04, 1.08, 1.14, 1.2, 1.3, 1.5)


@dataclass(frozen=True)
class Arrivals:
    """The time and the tenant of each request, drawn before the run."""

    times_s: tuple[float, ...]
    tenants: tuple[int, ...]


def poisson_arrivals(
    rate_qps: float, count: int, tenant_shares: Sequence[float], generator: np.random.Generator
) -> Arrivals:
    """`count` Poisson arrivals at a mean rate, distributed over tenants by their shares."""
    times = np.cumsum(generator.exponential(1 / rate_qps, count))
    tenants = generator.choice(len(tenant_shares), count, p=tenant_shares)
    return Arrivals(tuple(times.tolist()), tuple(tenants.tolist()))


def simulate(
    arrivals: Arrivals,
    plans: Sequence[BatchPlan],
    queue: RequestQueue,
    *,
    max_batch: int,
    batching_delay_s: float,
) -> list[float | None]:
    """The latency of each request in seconds; None for a refused one."""
    latencies: list[float | None] = [None] * len(arrivals.times_s)
    now, index = 0.0, 0
    while index < len(arrivals.times_s) or len(queue):
        while index < len(arrivals.times_s) and arrivals.times_s[index] <= now:
            queue.offer(Request(index, index, 0, arrivals.tenants[index], arrivals.times_s[index]))
            index += 1
        start = dispatch_time_s(queue, max_batch=max_batch, batching_delay_s=batching_delay_s)
        next_arrival = arrivals.times_s[index] if index < len(arrivals.times_s) else None
        if start is None:
            assert next_arrival is not None
            now = next_arrival
            continue
        if start > now:
            now = start if next_arrival is None else min(start, next_arrival)
            continue
        batch = next_batch(queue, plans)
        now += batch.plan.seconds
        for requests in batch.requests:
            for request in requests:
                latencies[request.sequence_number] = now - request.arrival_s
    return latencies


@dataclass(frozen=True)
class Queueing:
    """A server as the simulation knows it: its batch plans and its batching policy."""

    plans: tuple[BatchPlan, ...]
    tenant_shares: tuple[float, ...]
    max_batch: int
    batching_delay_s: float
    bound_s: float

    def late_share(self, rate_qps: float, *, requests: int, runs: int) -> float:
        """The share of requests that are later than the bound, in runs that begin idle.

        All rates meet the same arrivals, at their own pace.
        """
        late = 0
        for seed in range(runs):
            generator = np.random.default_rng(seed)
            arrivals = poisson_arrivals(rate_qps, requests, self.tenant_shares, generator)
            latencies = simulate(
                arrivals,
                self.plans,
                RequestQueue(len(self.tenant_shares), requests),
                max_batch=self.max_batch,
                batching_delay_s=self.batching_delay_s,
            )
            late += sum(latency is None or latency > self.bound_s for latency in latencies)
        return late / (runs * requests)


def late_curve(
    queueing: Queueing, *, percentile: float, requests_at: Callable[[float], int]
) -> LateCurve:
    """The share of late requests around the sustained rate.

    Args:
        queueing: the server.
        percentile: 0 to 100.
        requests_at: rate -> the requests of a run.
    """
    allowed = 1 - percentile / 100
    long_run = min(MAX_LONG, round(LONG_LATE / allowed))
    per_rate = min(MAX_PER_RATE, round(CURVE_LATE / allowed))
    low, high = 0.0, peak_throughput_qps(queueing.plans, len(queueing.tenant_shares))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        share = queueing.late_share(middle, requests=long_run, runs=1)
        low, high = (middle, high) if share <= allowed else (low, middle)
    sustained = (low + high) / 2
    rates = tuple(sustained * factor for factor in CURVE_FACTORS)
    shares = [
        queueing.late_share(
            rate,
            requests=(requests := min(requests_at(rate), per_rate)),
            runs=max(1, per_rate // requests),
        )
        for rate in rates
    ]
    return LateCurve(rates, tuple(shares), sustained)
