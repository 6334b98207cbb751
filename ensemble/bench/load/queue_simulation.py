"""A discrete-event simulation of the request queue and the batcher: estimates the sustained rate.

The estimate is where the search begins; LoadGen's runs decide. Tests compare the simulation with
queueing theory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.bench.load.batching import (
    BatchPlan,
    dispatch_time_s,
    next_batch,
    peak_throughput_qps,
)
from ensemble.bench.load.request_queue import Request, RequestQueue

ESTIMATE_ARRIVALS = 1500
BISECTIONS = 10


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


def estimate_sustained_qps(
    plans: Sequence[BatchPlan],
    *,
    tenant_shares: Sequence[float],
    percentile: float,
    bound_s: float,
    max_batch: int,
    batching_delay_s: float,
) -> float:
    """The rate whose simulated latency `percentile` (0 to 100) meets `bound_s`, by bisection."""
    low, high = 0.0, peak_throughput_qps(plans, len(tenant_shares))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        arrivals = poisson_arrivals(
            middle, ESTIMATE_ARRIVALS, tenant_shares, np.random.default_rng(0)
        )
        latencies = simulate(
            arrivals,
            plans,
            RequestQueue(len(tenant_shares), ESTIMATE_ARRIVALS),
            max_batch=max_batch,
            batching_delay_s=batching_delay_s,
        )
        tail = float(
            np.percentile([latency for latency in latencies if latency is not None], percentile)
        )
        low, high = (middle, high) if tail <= bound_s else (low, middle)
    return (low + high) / 2
