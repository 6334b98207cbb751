"""A thread team: the workers of one call all run at the same time (gang scheduling).

Workers may wait for each other, so a call gets all of its threads or none, and the calls of a
process take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ensemble.machine.per_process import PerProcess


class _Call:
    """The workers of a call that run in other threads, and their outcome."""

    def __init__(self, task: Callable[[int], None], stop: Callable[[], None]) -> None:
        self._task, self._stop = task, stop
        self._changed = threading.Condition()
        self._running = self._ended = 0
        self._stopped = False
        self.error: BaseException | None = None

    def run(self, worker: int) -> None:
        """In another thread: be one worker, unless the call has stopped."""
        with self._changed:
            if self._stopped:
                return
            self._running += 1
        try:
            self._task(worker)
        except BaseException as error:
            self.error = error
            self.halt()
        finally:
            with self._changed:
                self._running -= 1
                self._ended += 1
                self._changed.notify_all()

    def halt(self) -> None:
        """Let no further worker start, and let waiting workers leave."""
        with self._changed:
            self._stopped = True
        self._stop()

    def wait(self, workers: int) -> None:
        """Wait until so many workers have ended, or the call has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ended == workers)

    def join(self) -> None:
        """Wait until no worker runs. After a stop none starts again."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)


class _Turns:
    """The lock that serializes calls, the pool for each team size, and the previous call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pools: dict[int, ThreadPoolExecutor] = {}
        self.before: _Call | None = None

    def pool(self, workers: int) -> ThreadPoolExecutor:
        """A pool of so many threads, kept for later calls."""
        if workers not in self.pools:
            self.pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="ensemble")
        return self.pools[workers]


_turns = PerProcess(_Turns)


def run_together(task: Callable[[int], None], workers: int, *, stop: Callable[[], None]) -> None:
    """Run `task(0)` in this thread and `task(1)` to `task(workers - 1)` concurrently in others.

    Returns when all have ended. Objects that `task` refers to live until its last worker has left,
    also if this thread is interrupted and leaves earlier.

    Args:
        task: called with the index of a worker.
        workers: at least 1.
        stop: makes waiting workers leave. Called if a worker cannot start or raises, or this thread
            is interrupted.

    Raises:
        whatever a worker, or starting it, has raised.
    """
    turns = _turns()
    with turns.lock:
        if turns.before is not None:  # interrupted twice: its workers may still run
            turns.before.join()
        call = turns.before = _Call(task, stop)
        try:
            for worker in range(1, workers):
                turns.pool(workers - 1).submit(call.run, worker)
            task(0)
            call.wait(workers - 1)
        except BaseException:
            call.halt()
            raise
        finally:
            call.join()
            turns.before = None  # it keeps alive what the task refers to
        if call.error is not None:
            raise call.error
