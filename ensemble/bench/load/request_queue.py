"""Requests that wait: bounded lanes, first come first served. No threads, no clock, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple


class Request(NamedTuple):
    """One image to be answered: by all models, or by the model that its lane stands for."""

    ident: int  # the referee's own
    number: int  # in the order of arrival
    image: int
    lane: int
    arrived_s: float


class Waiting:
    """At most `capacity` requests in `lanes` lanes; one that finds it full is refused."""

    def __init__(self, lanes: int, capacity: int) -> None:
        if lanes < 1 or capacity < 1:
            raise ValueError(
                f"expected lanes and capacity of at least 1, found {lanes}, {capacity}"
            )
        self._lanes: list[deque[Request]] = [deque() for _ in range(lanes)]
        self._capacity, self._count, self._most = capacity, 0, 0

    def __len__(self) -> int:
        return self._count

    @property
    def most(self) -> int:
        """The most that have ever waited."""
        return self._most

    def offer(self, request: Request) -> bool:
        """Let a request wait, at the end of its lane; False where it is refused."""
        if self._count >= self._capacity:
            return False
        self._lanes[request.lane].append(request)
        self._count += 1
        self._most = max(self._most, self._count)
        return True

    def counts(self) -> list[int]:
        """How many wait in each lane."""
        return [len(lane) for lane in self._lanes]

    def oldest(self) -> Request | None:
        """The request that came first of all that wait."""
        heads = [lane[0] for lane in self._lanes if lane]
        return min(heads, key=lambda request: request.number, default=None)

    def take(self, lanes: Sequence[int], most: int) -> list[list[Request]]:
        """The first `most` requests of each of these lanes, which wait no longer."""
        taken = []
        for index in lanes:
            lane = self._lanes[index]
            requests = list(islice(lane, most))
            for _ in requests:
                lane.popleft()
            self._count -= len(requests)
            taken.append(requests)
        return taken
