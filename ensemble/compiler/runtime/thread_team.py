"""Parts of one call, all running at the same time, a thread for each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ensemble.machine.per_process import PerProcess


class _Call:
    """The parts of a call that run in other threads: how many have ended, and how it went."""

    def __init__(self, task: Callable[[int], None], stop: Callable[[], None]) -> None:
        self._task, self._stop = task, stop
        self._changed = threading.Condition()
        self._running = self._ended = 0
        self._stopped = False
        self.error: BaseException | None = None

    def run(self, part: int) -> None:
        """In a worker: take one part, unless the call is over."""
        with self._changed:
            if self._stopped:
                return
            self._running += 1
        try:
            self._task(part)
        except BaseException as error:
            self.error = error
            self.halt()
        finally:
            with self._changed:
                self._running -= 1
                self._ended += 1
                self._changed.notify_all()

    def halt(self) -> None:
        """Let no further part start, and those that wait for another one leave."""
        with self._changed:
            self._stopped = True
        self._stop()

    def wait(self, parts: int) -> None:
        """Until so many parts have ended, or the call was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ended == parts)

    def leave(self) -> None:
        """Until no part runs. Of a call that was stopped none will run again."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)


class _Turn:
    """One call at a time: its lock, the workers for each number of parts, the call before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pools: dict[int, ThreadPoolExecutor] = {}
        self.before: _Call | None = None

    def pool(self, workers: int) -> ThreadPoolExecutor:
        """As many threads as asked for, kept."""
        if workers not in self.pools:
            self.pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="ensemble")
        return self.pools[workers]


_turn = PerProcess(_Turn)


def run_together(task: Callable[[int], None], parts: int, *, stop: Callable[[], None]) -> None:
    """Run `task(0)` in this thread, `task(1)` to `task(parts - 1)` beside it, until all have ended.

    Parts may wait for each other, so a call has all of its threads or none: calls of a process take
    turns. What `task` refers to lives until its last part has left, also where this thread is
    interrupted and leaves before.

    Args:
        task: called with the number of a part.
        parts: at least 1.
        stop: makes parts that wait for another one leave. Called where a part cannot start, where
            one raises, and where this thread is interrupted.

    Raises:
        whatever a part, or starting it, has raised.
    """
    turn = _turn()
    with turn.lock:
        if turn.before is not None:  # interrupted twice: its parts may still run
            turn.before.leave()
        call = turn.before = _Call(task, stop)
        try:
            for part in range(1, parts):
                turn.pool(parts - 1).submit(call.run, part)
            task(0)
            call.wait(parts - 1)
        except BaseException:
            call.halt()
            raise
        finally:
            call.leave()
            turn.before = None  # it has all that the task refers to
        if call.error is not None:
            raise call.error
