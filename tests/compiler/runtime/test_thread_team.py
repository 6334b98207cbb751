"""Gang scheduling: all workers of a call start or none does, and no call hangs."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ensemble.compiler.runtime.thread_team import run_together

TIMEOUT_S = 60


class Barrier:
    """What the workers of a program do: wait for all, or leave on stop."""

    def __init__(self, workers: int) -> None:
        self.workers, self.stopped = workers, False
        self.arrived: list[int] = []
        self.left: list[int] = []

    def __call__(self, worker: int) -> None:
        self.arrived.append(worker)
        while len(self.arrived) < self.workers and not self.stopped:
            time.sleep(0)
        self.left.append(worker)

    def stop(self) -> None:
        self.stopped = True


def no_op() -> None:
    pass


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_every_worker_runs_once_and_has_ended_when_the_call_returns(workers: int) -> None:
    for _ in range(20):
        barrier = Barrier(workers)
        run_together(barrier, workers, stop=barrier.stop)
        assert sorted(barrier.left) == list(range(workers))
        assert not barrier.stopped


def test_concurrent_calls_take_turns_without_deadlock() -> None:
    failures: list[BaseException] = []

    def call() -> None:
        try:
            for _ in range(50):
                barrier = Barrier(3)
                run_together(barrier, 3, stop=barrier.stop)
                assert sorted(barrier.left) == [0, 1, 2]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_worker_that_raises_lets_the_others_leave_and_the_next_call_runs(failing: int) -> None:
    barrier = Barrier(3)

    def task(worker: int) -> None:
        if worker == failing:
            raise MemoryError("no room")
        barrier(worker)

    with pytest.raises(MemoryError, match="no room"):
        run_together(task, 3, stop=barrier.stop)
    assert sorted(barrier.left) == sorted(barrier.arrived)
    after = Barrier(3)
    run_together(after, 3, stop=after.stop)
    assert len(after.left) == 3


@pytest.fixture
def interrupted_submit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C after the first of two workers was started."""
    from concurrent.futures import ThreadPoolExecutor

    submit, seen = ThreadPoolExecutor.submit, []

    def interrupting(self: ThreadPoolExecutor, *arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return submit(self, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupting)
    yield
    assert len(seen) >= 2


@pytest.mark.usefixtures("interrupted_submit")
def test_an_interrupt_while_workers_start_leaves_none_waiting() -> None:
    barrier = Barrier(3)
    with pytest.raises(KeyboardInterrupt):
        run_together(barrier, 3, stop=barrier.stop)
    assert barrier.stopped
    assert sorted(barrier.left) == sorted(barrier.arrived)
    after = Barrier(3)
    run_together(after, 3, stop=after.stop)
    assert len(after.left) == 3


SETUP = """
import gc; gc.disable()  # its imports take a third less
import os, signal, sys, threading, time
import torch
from torch import nn
import ensemble

torch.manual_seed(0)
torch.set_num_threads({threads})

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.c, self.fc = nn.Conv2d(96, 32, 1), nn.Linear(32, 7)

    def forward(self, x):
        x = self.a(x).relu()
        x = self.c(torch.cat([x, self.b(x)], 1))  # splits the network into programs
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))

models = [Net().eval().requires_grad_(False) for _ in range(5)]
x = torch.randn(1, 3, {size}, {size})
forward = ensemble.build("lowered_vmap", models, x)
expected = forward(x)
"""


def run(code: str, *, threads: int, size: int = 16) -> str:
    """The output of a program in its own process: one that hangs fails here."""
    program = SETUP.format(threads=threads, size=size) + code
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_forwards_of_several_programs_called_from_several_threads_neither_hang_nor_differ() -> None:
    code = """
other = ensemble.build("lowered_vmap", models[:4], x)
wrong = []
def work(function, right):
    for _ in range(100):
        if not torch.equal(function(x), right):
            wrong.append(function)
calls = [(forward, expected), (other, other(x)), (forward, expected)]
threads = [threading.Thread(target=work, args=call) for call in calls]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(wrong))
"""
    assert run(code, threads=4) == "0\n"


def test_a_process_forked_after_a_first_call_has_threads_of_its_own() -> None:
    code = """
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # libgomp's own threads are not inherited
    signal.alarm(20)
    os._exit(0 if torch.equal(forward(x), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, threads=3) == "0\n"


@pytest.mark.slow
def test_interrupts_during_calls_leave_a_process_that_computes_and_ends() -> None:
    code = """
def interrupt():
    for _ in range(30):
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    done.append(True)
signal.signal(signal.SIGINT, signal.default_int_handler)
done, interrupts = [], 0
threading.Thread(target=interrupt).start()
while not done:
    try:
        while not done:
            forward(x)
    except KeyboardInterrupt:
        interrupts += 1
try:
    time.sleep(0.05)
except KeyboardInterrupt:
    pass
print(interrupts > 0, torch.equal(forward(x), expected))
"""
    assert run(code, threads=3, size=64) == "True True\n"
