"""Work stealing gives the results of one thread, and waits for no worker that is away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from ensemble.compiler.codegen.simd import FLOAT_BYTES, WIDTH
from ensemble.compiler.planning.row_tiling import CacheSizes
from ensemble.compiler.planning.step import Kind
from ensemble.compiler.runtime import entry_points, program, work_stealing
from tests.compiler.planning.test_row_tiling import (
    CHANNELS,
    IMAGES,
    ONE,
    bottleneck,
)

SIZE = (33, 9)
State = Callable[[np.ndarray], None]


def make(num_models: int, threads: int, kernel: int = 3) -> program.Program:
    size, padding = [kernel] * 2, [kernel // 2] * 2
    steps = bottleneck(SIZE, size, ONE, padding, ONE, 2 * CHANNELS)
    options: Any = {"inputs": [0], "outputs": [9], "dtype": torch.float32}
    options["cache"] = CacheSizes(0, 1875 * WIDTH)  # row tiling, even of small programs
    return program.Program(steps, num_models=num_models, threads=threads, **options)


def images() -> Tensor:
    return torch.randn(2, IMAGES, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(0))


def begin_with(monkeypatch: pytest.MonkeyPatch, change: State) -> None:
    """Calls begin with a state as if workers had made progress."""
    original = work_stealing.new_state

    def new_state(parts: int, steps: int) -> np.ndarray:
        state = original(parts, steps)
        change(state)
        return state

    monkeypatch.setattr(work_stealing, "new_state", new_state)


def of_worker(worker: int, kind: int) -> int:
    return int(work_stealing._WORKERS + work_stealing._PER_WORKER * worker + kind)


def copies_overlap(both: program.Program) -> bool:
    """Do reused rows overlap the place that they are copied to?"""
    copies = both._tiled_table[both._tiled_table["kind"] == Kind.COPY]
    rows = copies["width"] * copies["channels"] * FLOAT_BYTES
    return bool((copies["x"] - copies["out"] < copies["height"] * rows).any())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("thieves", [1, 2, 20])
def test_a_victim_computes_all_parts_itself_if_its_thieves_never_claim_one(
    thieves: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, both = images(), make(2, threads=2, kernel=kernel)
    alone = both(x)[0]
    assert copies_overlap(both) == (kernel == 5)

    def join(state: np.ndarray) -> None:
        for worker in range(2):
            state[of_worker(worker, work_stealing._THIEVES)] = thieves

    begin_with(monkeypatch, join)
    assert torch.equal(both(x)[0], alone)


@pytest.mark.parametrize("first", range(12))
def test_a_thief_continues_from_the_published_step(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A victim has taken both models, has run some steps of the first, and has published it. From
    then on it is away, and the thief computes the rest, in the victim's arena."""
    x, both = images(), make(2, threads=2)
    alone = both(x)[0]
    original, new_state = entry_points.run, work_stealing.new_state
    arenas = both._memory[0]

    def publish(state: np.ndarray) -> None:
        state[work_stealing.TAKEN] = 2
        state[of_worker(0, work_stealing._PUBLISHED)] = first * work_stealing._SIZES + 2

    def go_on(table: np.ndarray, tiled_table: np.ndarray, *rest: Any) -> None:
        assert first < len(tiled_table)
        before, state = tiled_table[:first], new_state(1, first)
        original(before, before, *rest[:2], state.ctypes.data, 0, 1, 1)
        original(table, tiled_table, *rest)

    begin_with(monkeypatch, publish)
    monkeypatch.setattr(entry_points, "run", go_on)
    monkeypatch.setattr(program, "run_together", lambda task, parts, stop: task(1))
    for arena in arenas:
        arena.fill_(255)
    assert torch.equal(both(x)[0][0], alone[0])
    assert bool((arenas[1] == 255).all())


def test_a_model_left_over_is_computed_by_whichever_worker_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, one = images()[0], make(1, threads=3)
    expected = one(x)[0]
    assert torch.equal(expected, make(1, threads=1)(x)[0])
    monkeypatch.setattr(program, "run_together", lambda task, parts, stop: task(2))
    assert torch.equal(one(x)[0], expected)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_bitwise_equal_results_at_every_call(threads: int) -> None:
    x, several = images(), make(2, threads=threads)
    one = make(2, threads=1)(x)[0]
    for _ in range(100):
        assert torch.equal(several(x)[0], one)
