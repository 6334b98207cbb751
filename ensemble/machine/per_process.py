"""What cannot be inherited by a forked process, thread pools and locks, made anew in each."""

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
    """`holder()`: what `make()` gives, made once in this process, at its first use there.

    A forked process inherits a pool's object and none of its threads, and a lock perhaps locked by
    a thread that it has not: it forgets both, and its own first use calls `make` again. Threads
    that use it first at once wait for one of them to make it; what `make` raises reaches the
    caller, and the next use tries again.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: tuple[T] | None = None
        self._lock = threading.Lock()
        _HOLDERS.add(self)

    def __call__(self) -> T:
        made = self._made  # read once: a tuple is put there whole
        if made is None:
            with self._lock:
                made = self._made
                if made is None:
                    made = self._made = (self._make(),)
        return made[0]

    def _forget(self) -> None:
        self._made, self._lock = None, threading.Lock()


_HOLDERS: WeakSet[PerProcess[Any]] = WeakSet()


def _forget_all() -> None:
    """In a forked process, where the thread that forked is the only one: nobody else looks."""
    for holder in list(_HOLDERS):
        holder._forget()


if hasattr(os, "register_at_fork"):  # elsewhere there is no fork
    os.register_at_fork(after_in_child=_forget_all)


@cache
def compute_alone_in_forks() -> None:
    """From now on torch computes on one thread in a process that is forked from this one.

    GNU OpenMP believes there that it still has the threads of the thread that forked, and waits for
    them for ever (pytorch/pytorch#17199): so does every larger operation of torch's own. torch does
    the same in the workers of a DataLoader. Threads that the process starts may ask for more.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
