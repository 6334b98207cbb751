"""The same queue and batcher on a clock that is counted, not waited for: a guess of what is held.

It says where the search for the highest rate begins, and tests compare it with queueing theory. The
referee's runs decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.bench.load.batching import (
    Way,
    most_per_second,
    ready_s,
    take,
)
from ensemble.bench.load.request_queue import Request, Waiting

ARRIVALS = 1500  # of a guess


@dataclass(frozen=True)
class Traffic:
    """Arrivals that are drawn ahead: when each comes, and for which lane."""

    times_s: tuple[float, ...]
    lanes: tuple[int, ...]


def poisson(
    rate_qps: float, count: int, shares: Sequence[float], generator: np.random.Generator
) -> Traffic:
    """`count` arrivals at `rate_qps` in the mean, for lanes in these shares."""
    times = np.cumsum(generator.exponential(1 / rate_qps, count))
    lanes = generator.choice(len(shares), count, p=shares)
    return Traffic(tuple(times.tolist()), tuple(lanes.tolist()))


def latencies(
    traffic: Traffic,
    ways: Sequence[Way],
    waiting: Waiting,
    *,
    max_batch: int,
    max_wait_s: float,
) -> list[float | None]:
    """The seconds from each arrival to its answer; None for one that was refused."""
    found: list[float | None] = [None] * len(traffic.times_s)
    now, coming = 0.0, 0
    while coming < len(traffic.times_s) or len(waiting):
        while coming < len(traffic.times_s) and traffic.times_s[coming] <= now:
            waiting.offer(
                Request(coming, coming, 0, traffic.lanes[coming], traffic.times_s[coming])
            )
            coming += 1
        start = ready_s(waiting, max_batch=max_batch, max_wait_s=max_wait_s)
        following = traffic.times_s[coming] if coming < len(traffic.times_s) else None
        if start is None:
            assert following is not None
            now = following
            continue
        if start > now:
            now = start if following is None else min(start, following)
            continue
        batch = take(waiting, ways)
        now += batch.way.seconds
        for lane in batch.requests:
            for request in lane:
                found[request.number] = now - request.arrived_s
    return found


def guess(
    ways: Sequence[Way],
    *,
    shares: Sequence[float],
    percentile: float,
    bound_s: float,
    max_batch: int,
    max_wait_s: float,
) -> float:
    """The rate whose `percentile` (0 to 100) stays within `bound_s` here, by halving."""
    low, high = 0.0, most_per_second(ways, len(shares))
    for _ in range(10):
        middle = (low + high) / 2
        traffic = poisson(middle, ARRIVALS, shares, np.random.default_rng(0))
        found = latencies(
            traffic,
            ways,
            Waiting(len(shares), ARRIVALS),
            max_batch=max_batch,
            max_wait_s=max_wait_s,
        )
        tail = float(
            np.percentile([latency for latency in found if latency is not None], percentile)
        )
        low, high = (middle, high) if tail <= bound_s else (low, middle)
    return (low + high) / 2
