"""The system under test: what arrives waits, one thread computes it, each request gets its answer.

Requests come from the referee's thread. The thread that has built the forwards also runs them,
because a compiled forward may be compiled again on another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ensemble.bench.load.batching import (
    Batch,
    Way,
    ready_s,
    take,
)
from ensemble.bench.load.request_queue import Request, Waiting
from ensemble.errors import first_line

Clock = Callable[[], float]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """How requests are put together."""

    ways: tuple[Way, ...]
    lanes: int
    max_batch: int
    max_wait_s: float
    capacity: int


@dataclass
class Tally:
    """What happened so far; the one thing here that changes."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    wrong: int = 0
    batches: int = 0
    slots: int = 0
    computing_s: float = 0.0  # in the forwards themselves
    serving_s: float = 0.0  # from taking a batch to having answered it
    arriving_s: float = 0.0  # in taking requests in
    errors: list[str] = field(default_factory=list)  # the first of them
    missed: list[int] = field(default_factory=list)  # numbers of those refused or failed

    @property
    def overhead_s(self) -> float | None:
        """What this program adds to the forwards, for each answered request."""
        added = self.serving_s - self.computing_s + self.arriving_s
        return added / self.answered if self.answered else None


class Server:
    """Takes requests in by `arrive`, answers them in the thread that calls `serve`.

    Args:
        policy: the ways to compute, and the bounds.
        compute: a batch -> how many of its requests got a wrong answer, and the seconds in the
            forward. What it raises fails its requests, and all that come later.
        answer: told the idents of requests that are done.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        compute: Callable[[Batch], tuple[int, float]],
        answer: Callable[[Sequence[int]], None],
        clock: Clock = time.perf_counter,
    ) -> None:
        self._policy, self._compute, self._answer = policy, compute, answer
        self._clock = clock
        self._waiting = Waiting(policy.lanes, policy.capacity)
        self._changed = threading.Condition()
        self._closed, self._number, self._held = False, 0, list[int]()
        self.tally = Tally()

    @property
    def most_waiting(self) -> int:
        return self._waiting.most

    def arrive(self, wanted: Sequence[tuple[int, int, int]]) -> None:
        """Take in requests (ident, image, lane); never waits for a forward.

        One that is refused is answered at the end alone, so that to the referee it is the slowest
        of all and not the fastest.
        """
        begin, lost = self._clock(), list[int]()
        with self._changed:
            for ident, image, lane in wanted:
                request = Request(ident, self._number, image, lane, begin)
                self._number += 1
                if self.tally.errors:
                    self.tally.failed += 1
                    self.tally.missed.append(request.number)
                    lost.append(ident)
                elif not self._waiting.offer(request):
                    self.tally.refused += 1
                    self.tally.missed.append(request.number)
                    self._held.append(ident)
            self._changed.notify()
            self.tally.arriving_s += self._clock() - begin
        if lost:
            self._answer(lost)

    def finish(self) -> None:
        """No more will arrive: tell the referee of the refused ones. Those that wait are served."""
        with self._changed:
            held, self._held = self._held, []
        if held:
            self._answer(held)

    def close(self) -> None:
        """Let `serve` return once nobody waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def serve(self) -> None:
        """Compute and answer until closed, with nobody left waiting."""
        while (batch := self._next()) is not None:
            begin = self._clock()
            try:
                wrong, seconds = self._compute(batch)
            except Exception as error:
                log.debug("a forward failed", exc_info=True)
                self._fail(batch, f"{type(error).__name__}: {first_line(error)}")
                continue
            self._answer([request.ident for lane in batch.requests for request in lane])
            tally = self.tally
            tally.answered += batch.count
            tally.wrong += wrong
            tally.batches += 1
            tally.slots += batch.slots
            tally.computing_s += seconds
            tally.serving_s += self._clock() - begin

    def _next(self) -> Batch | None:
        """The next batch; None when closed and nobody waits."""
        policy = self._policy
        with self._changed:
            while True:
                start = ready_s(
                    self._waiting, max_batch=policy.max_batch, max_wait_s=policy.max_wait_s
                )
                if start is None and self._closed:
                    return None
                wait_s = None if start is None else start - self._clock()
                if wait_s is not None and (wait_s <= 0 or self._closed):
                    return take(self._waiting, policy.ways)
                self._changed.wait(wait_s)

    def _fail(self, batch: Batch, why: str) -> None:
        """The batch and all that wait have failed; what arrives from now on fails at once."""
        with self._changed:
            self.tally.errors.append(why)
            rest = self._waiting.take(range(self._policy.lanes), len(self._waiting))
            lost = [request for lane in (*batch.requests, *rest) for request in lane]
            self.tally.failed += len(lost)
            self.tally.missed += [request.number for request in lost]
        self._answer([request.ident for request in lost])
