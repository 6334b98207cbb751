"""Fork-safe singletons: thread pools and locks, recreated in each forked process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch

T = TypeVar("T")


class PerProcess(Generic[T]):
    """`holder()` returns the value of `make()`, called once per process, on first use.

    A forked process inherits a pool object without its threads, and a lock that a thread which was
    not inherited may hold. So the value and the lock are reset in the child, and its first use
    calls `make` again. Threads that race for the first use wait for one of them to call `make`; an
    exception of `make` propagates to that caller, and the next use retries.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: tuple[T] | None = None
        self._lock = threading.Lock()
        _HOLDERS.add(self)

    def __call__(self) -> T:
        value = self._value  # read once; the assignment of a tuple is atomic
        if value is None:
            with self._lock:
                value = self._value
                if value is None:
                    value = self._value = (self._make(),)
        return value[0]

    def _reset(self) -> None:
        self._value, self._lock = None, threading.Lock()


_HOLDERS: WeakSet[PerProcess[Any]] = WeakSet()


def _reset_all() -> None:
    """Runs in the forked child, whose only thread is the one that forked: no locking needed."""
    for holder in list(_HOLDERS):
        holder._reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset_all)


@cache
def use_one_thread_after_fork() -> None:
    """Set torch to one thread in every process that is forked from this one.

    After a fork GNU OpenMP waits forever for the parent's worker threads, and so does every larger
    torch operation (pytorch/pytorch#17199). torch does the same in DataLoader workers. Threads
    that the child starts may set a larger number.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
