"""Which requests are computed next, and how: by what each way is known to take. Pure.

A way is a forward that was built for one number of images. `alone` computes one lane, whose
requests are the oldest; `together` computes every lane, also those in which nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ensemble.bench.load.request_queue import Request, Waiting

ALONE, TOGETHER = "alone", "together"


@dataclass(frozen=True)
class Way:
    """A forward of `size` images a lane, and the seconds that it takes."""

    mode: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Batch:
    """The requests of each computed lane, in the order of `lanes`, and the way to compute them."""

    way: Way
    lanes: tuple[int, ...]
    requests: tuple[tuple[Request, ...], ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.requests))

    @property
    def slots(self) -> int:
        """Images that are computed, asked for or not."""
        return self.way.size * len(self.lanes)


def sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes to build: powers of two up to `max_batch`, and that itself."""
    powers = [2**power for power in range(max_batch.bit_length()) if 2**power <= max_batch]
    return tuple(dict.fromkeys([*powers, max_batch]))


def choose(ways: Sequence[Way], counts: Sequence[int], oldest: int) -> Way:
    """The way that takes least time for each request that it answers; of equals the shortest.

    Args:
        ways: at least one.
        counts: how many requests wait in each lane.
        oldest: the lane of the oldest request.
    """

    def cost(way: Way) -> tuple[float, float]:
        lanes = [counts[oldest]] if way.mode == ALONE else counts
        answered = sum(min(count, way.size) for count in lanes)
        return way.seconds / answered if answered else inf, way.seconds

    return min(ways, key=cost)


def ready_s(waiting: Waiting, *, max_batch: int, max_wait_s: float) -> float | None:
    """When the next batch may start: at once (0), or when its oldest request has waited on purpose.

    None where nobody waits.
    """
    oldest = waiting.oldest()
    if oldest is None:
        return None
    if max_wait_s <= 0 or waiting.counts()[oldest.lane] >= max_batch:
        return 0.0
    return oldest.arrived_s + max_wait_s


def take(waiting: Waiting, ways: Sequence[Way]) -> Batch:
    """The next batch of what waits, which is at least one request."""
    oldest = waiting.oldest()
    if oldest is None:
        raise ValueError("expected a waiting request, found none")
    counts = waiting.counts()
    way = choose(ways, counts, oldest.lane)
    lanes = (oldest.lane,) if way.mode == ALONE else tuple(range(len(counts)))
    taken = waiting.take(lanes, way.size)
    return Batch(way, lanes, tuple(map(tuple, taken)))


def most_per_second(ways: Sequence[Way], lanes: int) -> float:
    """The requests per second of the best way, where every slot is filled."""
    return max(way.size * (1 if way.mode == ALONE else lanes) / way.seconds for way in ways)
