"""The request queue: bounded, one FIFO per tenant. No threads, no clock, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple


class Request(NamedTuple):
    """One image to classify: by the model of its tenant, or by every model of an ensemble."""

    sample_id: int  # LoadGen's own
    sequence_number: int  # in order of arrival
    image: int
    tenant: int
    arrival_s: float


class RequestQueue:
    """One FIFO per tenant. All tenants share `capacity`; a full queue refuses requests."""

    def __init__(self, num_tenants: int, capacity: int) -> None:
        if num_tenants < 1 or capacity < 1:
            raise ValueError(
                f"expected num_tenants and capacity of at least 1, got {num_tenants}, {capacity}"
            )
        self._fifos: list[deque[Request]] = [deque() for _ in range(num_tenants)]
        self._capacity, self._length, self._max_length = capacity, 0, 0

    def __len__(self) -> int:
        return self._length

    @property
    def max_length(self) -> int:
        """The maximum length so far."""
        return self._max_length

    def offer(self, request: Request) -> bool:
        """Append a request to the FIFO of its tenant; False if the queue is full."""
        if self._length >= self._capacity:
            return False
        self._fifos[request.tenant].append(request)
        self._length += 1
        self._max_length = max(self._max_length, self._length)
        return True

    def lengths(self) -> list[int]:
        """The number of queued requests of each tenant."""
        return [len(fifo) for fifo in self._fifos]

    def oldest(self) -> Request | None:
        """The queued request that arrived first; None if the queue is empty."""
        heads = [fifo[0] for fifo in self._fifos if fifo]
        return min(heads, key=lambda request: request.sequence_number, default=None)

    def pop(self, tenants: Sequence[int], limit: int) -> list[list[Request]]:
        """Remove and return the first `limit` requests of each of these tenants."""
        popped = []
        for tenant in tenants:
            fifo = self._fifos[tenant]
            requests = list(islice(fifo, limit))
            for _ in requests:
                fifo.popleft()
            self._length -= len(requests)
            popped.append(requests)
        return popped
