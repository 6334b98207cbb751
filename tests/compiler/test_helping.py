"""Threads that help each other compute what one would, and wait for none that is away."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import FLOAT_BYTES, WIDTH
from ensemble.compiler.planning import row_tiling
from ensemble.compiler.planning.operation import Kind
from ensemble.compiler.runtime import program
from tests.compiler.test_strips import (
    CHANNELS,
    IMAGES,
    ONE,
    bottleneck,
)

SIZE = (33, 9)
State = Callable[[np.ndarray], None]
run = sys.modules["ensemble.compiler.kernels.run"]  # the function of that name hides the module


@pytest.fixture
def by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a small program has runs by strips."""
    monkeypatch.setattr(row_tiling, "LARGE_BYTES", 0)
    monkeypatch.setattr(row_tiling, "STRIP_BYTES", 1875 * WIDTH)


def make(num_models: int, threads: int, kernel: int = 3) -> program.Program:
    size, padding = [kernel] * 2, [kernel // 2] * 2
    operations = bottleneck(SIZE, size, ONE, padding, ONE, 2 * CHANNELS)
    options: Any = {"inputs": [0], "outputs": [9], "dtype": torch.float32}
    return program.Program(operations, num_models=num_models, threads=threads, **options)


def images() -> Tensor:
    return torch.randn(2, IMAGES, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(0))


def begin_with(monkeypatch: pytest.MonkeyPatch, change: State) -> None:
    """Calls begin as if threads had done so much already."""
    original = kernels.new_state

    def new_state(parts: int, steps: int) -> np.ndarray:
        state = original(parts, steps)
        change(state)
        return state

    monkeypatch.setattr(kernels, "new_state", new_state)


def of_thread(part: int, kind: int) -> int:
    return int(run._THREADS + run._OF_THREAD * part + kind)


def moves_over_itself(both: program.Program) -> bool:
    """Are rows moved by less than they are?"""
    moves = both._by_strips[both._by_strips["kind"] == Kind.COPY]
    rows = moves["width"] * moves["channels"] * FLOAT_BYTES
    return bool((moves["x"] - moves["out"] < moves["height"] * rows).any())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("helpers", [1, 2, 20])
@pytest.mark.usefixtures("by_strips")
def test_one_that_is_asked_for_shares_does_them_all_where_nobody_comes(
    helpers: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, both = images(), make(2, threads=2, kernel=kernel)
    alone = both(x)[0]
    assert moves_over_itself(both) == (kernel == 5)

    def ask(state: np.ndarray) -> None:
        for part in range(2):
            state[of_thread(part, run._ASKED)] = helpers

    begin_with(monkeypatch, ask)
    assert torch.equal(both(x)[0], alone)


@pytest.mark.parametrize("first", range(12))
@pytest.mark.usefixtures("by_strips")
def test_a_helper_goes_on_from_where_it_is_told(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread has begun both models, has come so far with the first, and has told that it can be
    shared; it is away from then on, and the other one does the rest, in the arena of the first."""
    x, both = images(), make(2, threads=2)
    alone = both(x)[0]
    original, arenas = kernels.run, both._memory[0]

    def tell(state: np.ndarray) -> None:
        state[run.BEGUN] = 2
        state[of_thread(0, run._TOLD)] = first * run._SIZES + 2

    def go_on(steps: np.ndarray, by_strips: np.ndarray, *rest: Any) -> None:
        assert first < len(by_strips)
        before, state = by_strips[:first], run.new_state(1, first)
        original(before, before, *rest[:2], state.ctypes.data, 0, 1, 1)
        original(steps, by_strips, *rest)

    begin_with(monkeypatch, tell)
    monkeypatch.setattr(kernels, "run", go_on)
    monkeypatch.setattr(program, "run_together", lambda task, parts, stop: task(1))
    for arena in arenas:
        arena.fill_(255)
    assert torch.equal(both(x)[0][0], alone[0])
    assert bool((arenas[1] == 255).all())


@pytest.mark.usefixtures("by_strips")
def test_a_model_left_over_is_done_by_whoever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = images()[0], make(1, threads=3)
    expected = one(x)[0]
    assert torch.equal(expected, make(1, threads=1)(x)[0])
    monkeypatch.setattr(program, "run_together", lambda task, parts, stop: task(2))
    assert torch.equal(one(x)[0], expected)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.usefixtures("by_strips")
def test_any_number_of_threads_gives_the_same_at_every_call(threads: int) -> None:
    x, several = images(), make(2, threads=threads)
    one = make(2, threads=1)(x)[0]
    for _ in range(100):
        assert torch.equal(several(x)[0], one)
