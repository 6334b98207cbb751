"""Row tiling is bitwise equal to untiled steps, and stays in its memory."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from ensemble.compiler.codegen.simd import WIDTH
from ensemble.compiler.operators.conv2d import conv2d_step, pack_weight
from ensemble.compiler.operators.pooling import average_pool2d_step
from ensemble.compiler.planning import row_tiling
from ensemble.compiler.planning.row_tiling import CacheSizes
from ensemble.compiler.planning.shape_inference import pointwise
from ensemble.compiler.planning.step import Activation, Kind, Step
from ensemble.compiler.runtime import program
from tests.compiler.kernels.test_memory_bounds import check_guards, run_between_guards

__all__ = ["check_guards"]
ONE = [1, 1]
IMAGES, CHANNELS = 2, 2 * WIDTH


def convolution(
    x: int, out: int, size: tuple[int, int], channels: tuple[int, int], *options: Any
) -> Step:
    """`(kernel, stride, padding, dilation, groups)` of images of that size, of two models."""
    kernel, *sizes, groups = options
    generator = torch.Generator().manual_seed(out)
    shape = channels[1], channels[0] // groups, *kernel
    weight = torch.randn(2, *shape, generator=generator) / (shape[1] * kernel[0]) ** 0.5
    kind = Kind.GROUPED if groups > 1 else Kind.DIRECT
    step = conv2d_step(
        torch.empty(2, IMAGES, channels[0], *size),
        pack_weight(weight, kind, groups),
        torch.randn(2, channels[1], generator=generator),
        *(None, kind, kernel, *sizes, groups, False),
    )
    return replace(step, x=x, out=out)


def activation(
    x: int, out: int, size: tuple[int, int], function: Activation, channels: int = CHANNELS
) -> Step:
    like = torch.empty(2, IMAGES, channels, *size)
    return Step(Kind.ACTIVATION, pointwise(like), x, out, activation=function)


def bottleneck(size: tuple[int, int], *options: Any) -> list[Step]:
    """Expansion, grouped convolution, activation and projection, with a residual if shapes allow.

    Value 0 is the input, 9 the output, all others are intermediate.
    """
    wide = 2 * CHANNELS
    first = convolution(1, 2, size, (CHANNELS, wide), ONE, ONE, [0, 0], ONE, 1)
    second = convolution(2, 3, size, (wide, wide), *options)
    smaller = second.geometry.out_size
    third = activation(3, 4, smaller, Activation.SIGMOID, wide)
    fourth = convolution(4, 5, smaller, (wide, CHANNELS), ONE, ONE, [0, 0], ONE, 1)
    if smaller == size:
        fourth = replace(fourth, other=1)
    begin = activation(0, 1, size, Activation.HARDSWISH)
    end = activation(5, 9, smaller, Activation.RELU6)
    return [begin, replace(first, relu=True), second, third, fourth, end]


SIZE = 21, 8
BETWEEN = convolution(4, 5, SIZE, (CHANNELS, CHANNELS), [3, 3], ONE, ONE, ONE, 1)


def pooled(x: int, out: int, window: tuple[int, int]) -> Step:
    like = torch.empty(2, IMAGES, CHANNELS, *SIZE)
    step = average_pool2d_step(like, window, window, [0, 0], False, False)
    return replace(step, x=x, out=out)


@pytest.fixture
def untiled_and_tiled(
    monkeypatch: pytest.MonkeyPatch, check_guards: Callable[[], None]
) -> Callable[[list[Step], torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """The result of steps without row tiling, and with tiles of so many bytes."""

    def run(
        steps: list[Step], x: torch.Tensor, tile_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        endless, cache = CacheSizes(sys.maxsize, sys.maxsize), CacheSizes(0, tile_bytes)
        inside = {1, 2, 3, 4, 5}
        assert not row_tiling.select_tilings(steps, inside, cache=endless)
        untiled = run_between_guards(steps, [x], 1, check_guards, endless)
        with monkeypatch.context() as patch:  # reading the weights again costs nothing
            patch.setattr(row_tiling, "_weight_bytes", lambda _: 0)
            assert row_tiling.select_tilings(steps, inside, cache=cache)
            return untiled, run_between_guards(steps, [x], 1, check_guards, cache)

    return run


UntiledAndTiled = Callable[[list[Step], torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("tile_bytes", [1, 20_000, 60_000])
@pytest.mark.parametrize("height", [7, 29, 40])
@pytest.mark.parametrize(
    "options",
    [
        ([3, 3], ONE, ONE, ONE),
        ([3, 3], [2, 2], ONE, ONE),
        ([5, 5], ONE, [2, 2], ONE),
        ([5, 3], [2, 1], [0, 1], ONE),
        ([3, 3], ONE, [2, 2], [2, 2]),
        ([1, 1], [3, 3], [0, 0], ONE),
        ([7, 7], ONE, [5, 3], ONE),
    ],
)
@pytest.mark.parametrize("share", [1, WIDTH])
def test_tiled_steps_are_bitwise_equal_to_untiled_ones(
    share: int,
    options: Any,
    height: int,
    tile_bytes: int,
    untiled_and_tiled: UntiledAndTiled,
) -> None:
    steps = bottleneck((height, 9), *options, 2 * CHANNELS // share)
    x = torch.randn(2, IMAGES, CHANNELS, height, 9)
    untiled, found = untiled_and_tiled(steps, x, tile_bytes)
    assert bool(untiled.isfinite().all())
    assert torch.equal(found, untiled)


def test_scales_per_channel_and_sums_are_tiled_too(
    untiled_and_tiled: UntiledAndTiled,
) -> None:
    begin = activation(0, 1, SIZE, Activation.HARDSWISH)
    steps = [
        begin,
        pooled(1, 2, SIZE),
        Step(Kind.SCALE, begin.geometry, 1, 3, 2),
        Step(Kind.SUM, begin.geometry, 3, 4, 1, relu=True),
        BETWEEN,
        activation(5, 9, SIZE, Activation.SILU),
    ]
    x = torch.randn(2, IMAGES, CHANNELS, *SIZE)
    untiled, found = untiled_and_tiled(steps, x, 3 * 8 * CHANNELS * 4)
    assert torch.equal(found, untiled)


def test_the_last_step_of_a_tiling_does_not_work_in_place(
    untiled_and_tiled: UntiledAndTiled,
) -> None:
    """An untiled activation may overwrite its input, but a tile must not overwrite other rows."""
    steps = [
        activation(0, 4, SIZE, Activation.HARDSWISH),
        BETWEEN,
        activation(5, 3, SIZE, Activation.SIGMOID),
        pooled(3, 9, (3, 2)),
    ]
    x = torch.randn(2, IMAGES, CHANNELS, *SIZE)
    untiled, found = untiled_and_tiled(steps, x, 3 * 8 * CHANNELS * 4)
    assert torch.equal(found, untiled)


def test_a_tiling_consists_of_large_intermediate_values_with_one_reader() -> None:
    chain = bottleneck((40, 9), [3, 3], ONE, ONE, ONE, 2 * CHANNELS)
    inside = {1, 2, 3, 4, 5}
    assert row_tiling.select_tilings(chain, inside) == []  # it fits a cache
    cache = CacheSizes(0, 6_250 * WIDTH)
    ((tiling,), (part,), read_twice) = (
        row_tiling.select_tilings(chain, inside, cache=cache),
        row_tiling.select_tilings(chain, inside - {4}, cache=cache),  # an output of the program
        row_tiling.select_tilings([*chain[:5], replace(chain[5], x=3)], inside, cache=cache),
    )
    assert (tiling.first, tiling.end) == (1, 5)
    assert 0 < tiling.rows < 40
    assert (part.first, part.end) == (1, 3)
    assert [(one.first, one.end) for one in read_twice] == [(1, 3), (3, 5)]
    # With so few rows per tile the weights would be read too often.
    narrow = bottleneck((40, 2), [3, 3], ONE, ONE, ONE, 2)
    assert row_tiling.select_tilings(narrow, inside, cache=CacheSizes(0, 1)) == []


def test_a_program_tiles_models_of_one_worker_and_not_shared_ones() -> None:
    steps = bottleneck((33, 9), [3, 3], ONE, ONE, ONE, 2 * CHANNELS)
    x = torch.randn(2, IMAGES, CHANNELS, 33, 9)
    options: Any = {"inputs": [0], "outputs": [9], "num_models": 2, "dtype": torch.float32}
    options["cache"] = CacheSizes(0, 30_000)
    alone, shared = (program.Program(steps, threads=threads, **options) for threads in (1, 4))
    torch.testing.assert_close(alone(x)[0], shared(x)[0], rtol=1e-6, atol=1e-6)
