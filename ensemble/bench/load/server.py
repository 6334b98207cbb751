"""The system under test: a request queue, and one thread that runs batches and answers requests.

LoadGen's thread issues requests. The thread that built the forwards also runs them, because
another thread could trigger a recompilation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ensemble.bench.load.batching import Batch, BatchPlan, dispatch_time_s, next_batch
from ensemble.bench.load.request_queue import Request, RequestQueue
from ensemble.errors import first_line

Clock = Callable[[], float]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchingPolicy:
    """How requests are queued and batched."""

    plans: tuple[BatchPlan, ...]
    num_tenants: int
    max_batch: int
    batching_delay_s: float
    queue_capacity: int


@dataclass
class Counters:
    """Mutable counters of one run."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    wrong: int = 0
    batches: int = 0
    slots: int = 0  # images computed, padding included
    forward_s: float = 0.0
    batch_s: float = 0.0  # from dequeuing a batch to answering it
    enqueue_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)  # sequence numbers: refused or failed

    @property
    def overhead_s(self) -> float | None:
        """Time outside of the forwards, per answered request."""
        overhead = self.batch_s - self.forward_s + self.enqueue_s
        return overhead / self.answered if self.answered else None


class Server:
    """Queues requests by `issue`, answers them in the thread that calls `serve`.

    Args:
        policy: the batch plans and the limits.
        execute: runs a batch; returns how many of its requests got a wrong answer, and the seconds
            of the forward. If it raises, its requests and all later ones fail.
        complete: is given the sample ids of requests that are done.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        *,
        execute: Callable[[Batch], tuple[int, float]],
        complete: Callable[[Sequence[int]], None],
        clock: Clock = time.perf_counter,
    ) -> None:
        self._policy, self._execute, self._complete = policy, execute, complete
        self._clock = clock
        self._queue = RequestQueue(policy.num_tenants, policy.queue_capacity)
        self._changed = threading.Condition()
        self._stopped, self._next_number, self._refused_ids = False, 0, list[int]()
        self.counters = Counters()

    @property
    def max_queue_length(self) -> int:
        return self._queue.max_length

    def issue(self, samples: Sequence[tuple[int, int, int]]) -> None:
        """Queue requests (sample id, image, tenant) without waiting for a forward.

        A refused request is completed only by `flush`, so that LoadGen counts it as the slowest
        request and not as the fastest.
        """
        begin, failed_ids = self._clock(), list[int]()
        with self._changed:
            for sample_id, image, tenant in samples:
                request = Request(sample_id, self._next_number, image, tenant, begin)
                self._next_number += 1
                if self.counters.errors:
                    self.counters.failed += 1
                    self.counters.unanswered.append(request.sequence_number)
                    failed_ids.append(sample_id)
                elif not self._queue.offer(request):
                    self.counters.refused += 1
                    self.counters.unanswered.append(request.sequence_number)
                    self._refused_ids.append(sample_id)
            self._changed.notify()
            self.counters.enqueue_s += self._clock() - begin
        if failed_ids:
            self._complete(failed_ids)

    def flush(self) -> None:
        """After the last request: complete the refused ones. Queued requests are still served."""
        with self._changed:
            refused_ids, self._refused_ids = self._refused_ids, []
        if refused_ids:
            self._complete(refused_ids)

    def stop(self) -> None:
        """Make `serve` return once the queue is empty."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def serve(self) -> None:
        """Run batches until stopped and the queue is empty."""
        while (batch := self._dequeue()) is not None:
            begin = self._clock()
            try:
                wrong, seconds = self._execute(batch)
            except Exception as error:
                log.debug("a forward failed", exc_info=True)
                self._fail(batch, f"{type(error).__name__}: {first_line(error)}")
                continue
            self._complete([request.sample_id for part in batch.requests for request in part])
            counters = self.counters
            counters.answered += batch.num_requests
            counters.wrong += wrong
            counters.batches += 1
            counters.slots += batch.num_slots
            counters.forward_s += seconds
            counters.batch_s += self._clock() - begin

    def _dequeue(self) -> Batch | None:
        """Wait for the next batch; None when stopped and the queue is empty."""
        policy = self._policy
        with self._changed:
            while True:
                start = dispatch_time_s(
                    self._queue,
                    max_batch=policy.max_batch,
                    batching_delay_s=policy.batching_delay_s,
                )
                if start is None and self._stopped:
                    return None
                wait_s = None if start is None else start - self._clock()
                if wait_s is not None and (wait_s <= 0 or self._stopped):
                    return next_batch(self._queue, policy.plans)
                self._changed.wait(wait_s)

    def _fail(self, batch: Batch, reason: str) -> None:
        """Fail the batch and all queued requests; later ones fail on arrival."""
        with self._changed:
            self.counters.errors.append(reason)
            queued = self._queue.pop(range(self._policy.num_tenants), len(self._queue))
            failed = [request for part in (*batch.requests, *queued) for request in part]
            self.counters.failed += len(failed)
            self.counters.unanswered += [request.sequence_number for request in failed]
        self._complete([request.sample_id for request in failed])
