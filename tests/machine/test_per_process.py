"""Fork-safe singletons."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ensemble.machine.per_process import PerProcess

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def passes_in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether `check()` is true in a forked process, within 20 s."""
    child = os.fork()
    if not child:
        threading.Timer(20, os._exit, (1,)).start()
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_concurrent_first_uses_share_one_value() -> None:
    made: list[int] = []
    together = threading.Barrier(8)

    def make() -> int:
        made.append(len(made))
        return made[-1]

    holder = PerProcess(make)

    def use(_: int) -> int:
        together.wait()
        return holder()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [0] * 8
    assert made == [0]


def test_a_failed_make_is_retried() -> None:
    answers = iter([0, 1])

    def make() -> str:
        return "made" * (1 // next(answers))

    holder = PerProcess(make)
    with pytest.raises(ZeroDivisionError):
        holder()
    assert holder() == "made"


@NEEDS_FORK
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_creates_its_own_pool_and_the_parent_keeps_its_own() -> None:
    holder = PerProcess(lambda: ThreadPoolExecutor(1))
    pool = holder()
    assert pool.submit(int, "7").result() == 7
    assert passes_in_a_fork(lambda: holder().submit(int, "7").result() == 7)
    assert holder() is pool
    pool.shutdown()


@NEEDS_FORK
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_during_make_does_not_deadlock_in_the_child() -> None:
    begun, may_end = threading.Event(), threading.Event()
    parent = os.getpid()

    def make() -> int:
        if os.getpid() == parent:
            begun.set()
            may_end.wait()
        return os.getpid()

    holder = PerProcess(make)
    thread = threading.Thread(target=holder)
    thread.start()
    begun.wait()
    assert passes_in_a_fork(lambda: holder() == os.getpid())
    may_end.set()
    thread.join()
    assert holder() == parent
