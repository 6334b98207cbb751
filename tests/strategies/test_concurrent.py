"""The thread pools of `concurrent`: no side effects on thread counts, and fork safety."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import ensemble
from ensemble.strategies import concurrent
from ensemble.strategies.stacked_outputs import stack_outputs
from tests.marks import some_slow
from tests.tiny import independent, tiny_models

ROOT = Path(__file__).parents[2]
NAMES = ["concurrent", "prepacked_concurrent"]


def thread_counts() -> tuple[int, int]:
    """torch's thread count in this thread, and in a new one."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return torch.get_num_threads(), seen[0]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_models", [1, 3, 4])
def test_build_and_call_preserve_torchs_thread_counts(name: str, num_models: int) -> None:
    x = torch.randn(1, 3, 8, 8)
    assert thread_counts() == (3, 3)
    forward = ensemble.build(name, tiny_models(num_models), x)
    assert thread_counts() == (3, 3)
    forward(x)
    assert thread_counts() == (3, 3)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("num_models", "threads"), [(1, [3]), (3, [1] * 3), (4, [1, 1, 1, 3])])
def test_each_worker_has_the_planned_number_of_threads(num_models: int, threads: list[int]) -> None:
    def one(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(torch.get_num_threads())

    forward = concurrent.concurrent_forward([one] * num_models, torch.randn(1, 3, 8, 8))
    for _ in range(2):
        assert stack_outputs(forward(torch.randn(1, 3, 8, 8)), num_models).tolist() == threads


@pytest.mark.usefixtures("three_threads")
def test_a_thread_with_its_own_thread_count_does_not_affect_others() -> None:
    x = torch.randn(1, 3, 8, 8)
    started, may_end, seen = threading.Event(), threading.Event(), []

    def set_own() -> None:
        torch.get_num_threads()  # initializes the count of this thread
        torch.set_num_threads(2)
        started.set()
        may_end.wait()
        ensemble.build("concurrent", tiny_models(4), x)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=set_own)
    thread.start()
    started.wait()
    torch.set_num_threads(3)
    may_end.set()
    thread.join()
    assert (seen, thread_counts()) == ([2], (3, 3))


@pytest.mark.usefixtures("three_threads")
def test_a_failed_build_preserves_torchs_thread_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(ThreadPoolExecutor):
        submitted = 0

        def submit(self, *arguments: Any, **options: Any) -> Any:
            """Fail as if the system had no more threads."""
            Failing.submitted += self._max_workers > 1
            if Failing.submitted == 2:
                raise RuntimeError("can't start new thread")
            return super().submit(*arguments, **options)

    monkeypatch.setattr(concurrent, "ThreadPoolExecutor", Failing)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ensemble.build("concurrent", tiny_models(3), torch.randn(1, 3, 8, 8))
    assert thread_counts() == (3, 3)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_models", [2, 5])
def test_calls_from_several_threads_do_not_mix(name: str, num_models: int) -> None:
    models, images = tiny_models(num_models), torch.randn(30, 2, 3, 8, 8).unbind()
    forward = ensemble.build(name, models, images[0])
    with ThreadPoolExecutor(3) as pool:
        for found, x in zip(pool.map(forward, images), images, strict=True):
            torch.testing.assert_close(found, independent(models, x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("name", "num_models"),
    some_slow(
        [
            *(("loop", 2), *zip(NAMES, (2, 3), strict=True)),
            *(("vmap", 2), ("folded_vmap", 2), ("lowered_vmap", 3), ("prepacked_loop", 2)),
        ],
        quick=2,
    ),
)
def test_a_forked_process_can_call_the_forward(name: str, num_models: int) -> None:
    program = """
import gc; gc.disable()  # imports take a third less
import os, sys, torch, ensemble
from tests.tiny import tiny_models
torch.set_num_threads(2)
x = torch.randn(2, 3, 64, 64)  # large enough for OpenMP threads, which the child lacks
forward = ensemble.build(sys.argv[1], tiny_models(int(sys.argv[2])), x)
expected = forward(x)
child = os.fork()
if not child:
    os._exit(0 if torch.allclose(forward(x), expected, rtol=1e-5, atol=1e-5) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", program, name, str(num_models)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
