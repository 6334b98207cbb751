"""The lock between calls of a forward and the exchange of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallGate:
    """Any number of calls at once, or one exchange: a readers-writer lock.

    An exchange that waits comes before later calls.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls, self._is_closed = 0, False

    def __enter__(self) -> None:
        with self._condition:
            while self._is_closed:
                self._condition.wait()
            self._calls += 1

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._calls -= 1
            if not self._calls:
                self._condition.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """The context in which no call runs."""
        with self._condition:
            while self._is_closed:
                self._condition.wait()
            self._is_closed = True
        try:
            with self._condition:
                while self._calls:
                    self._condition.wait()
            yield
        finally:
            with self._condition:
                self._is_closed = False
                self._condition.notify_all()
