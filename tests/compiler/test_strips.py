"""Steps by strips compute what whole steps do, to the last bit, and stay in their memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from ensemble.compiler.codegen.simd import WIDTH
from ensemble.compiler.operators import stacked
from ensemble.compiler.planning import row_tiling
from ensemble.compiler.planning.operation import Function, Kind, Operation
from ensemble.compiler.runtime import program
from tests.compiler.test_kernel_memory import check_guards, run_between_guards

__all__ = ["check_guards"]
ONE = [1, 1]
IMAGES, CHANNELS = 2, 2 * WIDTH


def convolution(
    x: int, out: int, size: tuple[int, int], channels: tuple[int, int], *options: Any
) -> Operation:
    """`(kernel, stride, padding, dilation, groups)` of images of that size, of two models."""
    kernel, *sizes, groups = options
    generator = torch.Generator().manual_seed(out)
    shape = channels[1], channels[0] // groups, *kernel
    weight = torch.randn(2, *shape, generator=generator) / (shape[1] * kernel[0]) ** 0.5
    kind = Kind.GROUPED if groups > 1 else Kind.DIRECT
    step = stacked.conv2d_operation(
        torch.empty(2, IMAGES, channels[0], *size),
        stacked.pack_weight(weight, kind, groups),
        torch.randn(2, channels[1], generator=generator),
        *(None, kind, kernel, *sizes, groups, False),
    )
    return replace(step, x=x, out=out)


def activation(
    x: int, out: int, size: tuple[int, int], function: Function, channels: int = CHANNELS
) -> Operation:
    like = torch.empty(2, IMAGES, channels, *size)
    return Operation(Kind.ACTIVATION, stacked.pointwise(like), x, out, function=function)


def bottleneck(size: tuple[int, int], *options: Any) -> list[Operation]:
    """An expansion, a convolution of groups, an activation and a projection; where shapes allow,
    with what came before added. Value 0 comes in, 9 goes out, all others stay inside."""
    wide = 2 * CHANNELS
    first = convolution(1, 2, size, (CHANNELS, wide), ONE, ONE, [0, 0], ONE, 1)
    second = convolution(2, 3, size, (wide, wide), *options)
    smaller = second.geometry.out_size
    third = activation(3, 4, smaller, Function.SIGMOID, wide)
    fourth = convolution(4, 5, smaller, (wide, CHANNELS), ONE, ONE, [0, 0], ONE, 1)
    if smaller == size:
        fourth = replace(fourth, other=1)
    begin = activation(0, 1, size, Function.HARDSWISH)
    end = activation(5, 9, smaller, Function.RELU6)
    return [begin, replace(first, relu=True), second, third, fourth, end]


SIZE = 21, 8
BETWEEN = convolution(4, 5, SIZE, (CHANNELS, CHANNELS), [3, 3], ONE, ONE, ONE, 1)


def pooled(x: int, out: int, window: tuple[int, int]) -> Operation:
    like = torch.empty(2, IMAGES, CHANNELS, *SIZE)
    step = stacked.average_pool2d_operation(like, window, window, [0, 0], False, False)
    return replace(step, x=x, out=out)


@pytest.fixture
def whole_and_by_strips(
    monkeypatch: pytest.MonkeyPatch, check_guards: Callable[[], None]
) -> Callable[[list[Operation], torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """The result of operations as whole steps, and of the same by strips of so many bytes."""

    def run(
        operations: list[Operation], x: torch.Tensor, strip_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(row_tiling, "runs_of", lambda *_: [])
            whole = run_between_guards(operations, [x], 1, check_guards)
        with monkeypatch.context() as patch:
            patch.setattr(row_tiling, "LARGE_BYTES", 0)
            patch.setattr(row_tiling, "STRIP_BYTES", strip_bytes)
            patch.setattr(row_tiling, "_weight_bytes", lambda _: 0)  # however often they are read
            assert row_tiling.runs_of(operations, {1, 2, 3, 4, 5})
            return whole, run_between_guards(operations, [x], 1, check_guards)

    return run


WholeAndByStrips = Callable[[list[Operation], torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 60_000])
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
def test_a_run_by_strips_computes_what_its_whole_steps_do(
    share: int,
    options: Any,
    height: int,
    strip_bytes: int,
    whole_and_by_strips: WholeAndByStrips,
) -> None:
    operations = bottleneck((height, 9), *options, 2 * CHANNELS // share)
    x = torch.randn(2, IMAGES, CHANNELS, height, 9)
    whole, found = whole_and_by_strips(operations, x, strip_bytes)
    assert bool(whole.isfinite().all())
    assert torch.equal(found, whole)


def test_factors_of_channels_and_sums_of_images_are_taken_by_strips_too(
    whole_and_by_strips: WholeAndByStrips,
) -> None:
    begin = activation(0, 1, SIZE, Function.HARDSWISH)
    operations = [
        begin,
        pooled(1, 2, SIZE),
        Operation(Kind.SCALE, begin.geometry, 1, 3, 2),
        Operation(Kind.SUM, begin.geometry, 3, 4, 1, relu=True),
        BETWEEN,
        activation(5, 9, SIZE, Function.SILU),
    ]
    x = torch.randn(2, IMAGES, CHANNELS, *SIZE)
    whole, found = whole_and_by_strips(operations, x, 3 * 8 * CHANNELS * 4)
    assert torch.equal(found, whole)


def test_a_run_does_not_end_in_place_of_its_last_strip(
    whole_and_by_strips: WholeAndByStrips,
) -> None:
    """An activation by itself may write over what it reads, but not rows over those of a strip."""
    operations = [
        activation(0, 4, SIZE, Function.HARDSWISH),
        BETWEEN,
        activation(5, 3, SIZE, Function.SIGMOID),
        pooled(3, 9, (3, 2)),
    ]
    x = torch.randn(2, IMAGES, CHANNELS, *SIZE)
    whole, found = whole_and_by_strips(operations, x, 3 * 8 * CHANNELS * 4)
    assert torch.equal(found, whole)


def test_a_run_is_made_of_what_is_large_read_once_and_known_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = bottleneck((40, 9), [3, 3], ONE, ONE, ONE, 2 * CHANNELS)
    inside = {1, 2, 3, 4, 5}
    assert row_tiling.runs_of(chain, inside) == []  # all of it fits a cache
    monkeypatch.setattr(row_tiling, "LARGE_BYTES", 0)
    monkeypatch.setattr(row_tiling, "STRIP_BYTES", 6_250 * WIDTH)
    ((run,), (part,), read_twice) = (
        row_tiling.runs_of(chain, inside),
        row_tiling.runs_of(chain, inside - {4}),  # which is a result of the program
        row_tiling.runs_of([*chain[:5], replace(chain[5], x=3)], inside),
    )
    assert (run.first, run.end) == (1, 5)
    assert 0 < run.rows < 40
    assert (part.first, part.end) == (1, 3)
    assert [(run.first, run.end) for run in read_twice] == [(1, 3), (3, 5)]
    # Where so few rows are there at a time that the weights are read too often.
    monkeypatch.setattr(row_tiling, "STRIP_BYTES", 1)
    assert row_tiling.runs_of(bottleneck((40, 2), [3, 3], ONE, ONE, ONE, 2), inside) == []


def test_a_program_takes_models_alone_by_strips_and_shared_ones_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_tiling, "LARGE_BYTES", 0)
    monkeypatch.setattr(row_tiling, "STRIP_BYTES", 30_000)
    operations = bottleneck((33, 9), [3, 3], ONE, ONE, ONE, 2 * CHANNELS)
    x = torch.randn(2, IMAGES, CHANNELS, 33, 9)
    options: Any = {"inputs": [0], "outputs": [9], "num_models": 2, "dtype": torch.float32}
    alone, shared = (program.Program(operations, threads=threads, **options) for threads in (1, 4))
    torch.testing.assert_close(alone(x)[0], shared(x)[0], rtol=1e-6, atol=1e-6)
