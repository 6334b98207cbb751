"""Where numbers are not finite or large, programs return what torch computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.planning.step import Activation, Kind, Step

pytest.importorskip("numba")

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import LARGE, PANEL, WIDTH
from ensemble.compiler.operators.affine import affine_step
from ensemble.compiler.operators.channel_conv import channel_conv_step
from ensemble.compiler.operators.conv2d import conv2d_step, pack_weight
from ensemble.compiler.operators.gather import gather_step
from ensemble.compiler.operators.group_norm import group_norm_step, stacked_group_norm
from ensemble.compiler.operators.layer_norm import layer_norm_step, stacked_layer_norm
from ensemble.compiler.operators.pixel_shuffle import pixel_shuffle_step
from ensemble.compiler.operators.pooling import (
    average_pool2d_step,
    max_pool2d_step,
    stacked_max_pool2d,
)
from ensemble.compiler.operators.resample import resample_step
from ensemble.compiler.planning.shape_inference import conv_geometry, pointwise
from ensemble.compiler.planning.vector_layout import conv_in_vectors, in_vectors
from ensemble.compiler.runtime import entry_points, program
from ensemble.compiler.runtime.program import Program
from ensemble.compiler.runtime.reference import Reference, unpacked_weight
from tests.compiler.kernels.test_memory_bounds import FUNCTIONS

INF, NAN = float("inf"), float("nan")
ONE, NONE = [1, 1], [0, 0]
SIZE = 7, 6
MODELS, IMAGES = 2, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def program_of(steps: Sequence[Step], count: int = 1, **options: Any) -> Program:
    """From the values 0 to `count` to the value 9."""
    asked: dict[str, Any] = {"outputs": [9], "num_models": MODELS, "threads": 1} | options
    return Program(steps, inputs=range(count), **({"dtype": torch.float32} | asked))


def by_reference(steps: Sequence[Step], *inputs: Tensor) -> Tensor:
    """The value 9 of all models, of the values 0, 1, ..."""
    run = Reference(steps)
    return torch.stack(
        [run(n, {i: x[n] for i, x in enumerate(inputs)}, [9])[9] for n in range(MODELS)]
    )


def assert_as_torch(found: Tensor, expected: Tensor, limit: float = 1e-4) -> None:
    """NaN and infinities at the same places, other numbers almost the same."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[~finite], expected[~finite], equal_nan=True)
    if finite.any():
        most = limit * float(expected[finite].abs().max())
        torch.testing.assert_close(found[finite], expected[finite], rtol=0, atol=most)


@dataclass(frozen=True)
class Convolution:
    """One of two models."""

    kind: Kind
    channels: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def options(self) -> Any:
        """Stride, padding, dilation and groups."""
        pad = self.kernel // 2 * self.dilation
        return [self.stride] * 2, [pad] * 2, [self.dilation] * 2, self.groups

    @property
    def weight(self) -> Tensor:
        share = self.channels // self.groups
        shape = MODELS, self.out_channels, share, self.kernel, self.kernel
        return randn(*shape, seed=1) / (share * self.kernel**2) ** 0.5

    @property
    def bias(self) -> Tensor:
        return randn(MODELS, self.out_channels, seed=2)

    def step(self, out: int, weight: Tensor | None = None, size: tuple[int, int] = SIZE) -> Any:
        """From the value 0."""
        weight = self.weight if weight is None else weight
        packed = pack_weight(weight, self.kind, self.groups)
        x = torch.empty(MODELS, IMAGES, self.channels, *size)
        kernel = [self.kernel] * 2
        step = conv2d_step(x, packed, self.bias, None, self.kind, kernel, *self.options, False)
        return replace(step, out=out)

    def by_torch(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        return torch.stack(
            [
                functional.conv2d(*operands, *self.options)
                for operands in zip(x, weight, self.bias, strict=True)
            ]
        )


CONVOLUTIONS = [
    Convolution(Kind.DIRECT, 3, 5, 7, 2),  # few channels, read as they are
    Convolution(Kind.DIRECT, 2 * WIDTH + 3, PANEL + 5),
    Convolution(Kind.DIRECT, WIDTH, PANEL, 3, 2, 2),
    Convolution(Kind.DIRECT, 5, 7, 1),
    Convolution(Kind.WINOGRAD_2, WIDTH + 3, PANEL + 5),
    Convolution(Kind.WINOGRAD_4, WIDTH + 3, PANEL + 5),
    Convolution(Kind.STRASSEN, 2 * WIDTH, 2 * PANEL, 1),
    Convolution(Kind.STRASSEN, 4 * WIDTH, 4 * PANEL, 1, 2),
    *(
        Convolution(Kind.GROUPED, groups * share, groups * out_share, 3, stride, 1, groups)
        for share, out_share, groups, stride in (
            *((1, 1, 20, 1), (1, 1, 20, 2), (2, 2, 9, 2), (3, 3, 7, 1), (3, 3, 7, 2)),
            *((1, 3, 7, 1), (4, 2, 5, 1), (8, 8, 3, 1), (24, 24, 2, 1)),
        )
    ),
    Convolution(Kind.GROUPED, 2 * WIDTH, 2 * WIDTH, 5, 1, 2, 2),
]
IN_BF16 = [replace(one, kind=Kind.DIRECT_BF16) for one in CONVOLUTIONS if one.kind == Kind.DIRECT]
RUNNABLE = [
    one
    for one in (*CONVOLUTIONS, *IN_BF16)
    if kernels.KERNELS[one.kind].cost
    and kernels.can_run(
        one.kind,
        conv_in_vectors(
            conv_geometry(
                torch.empty(1, one.channels, *SIZE, device="meta"),
                one.out_channels,
                [one.kernel] * 2,
                *one.options,
            )
        ),
    )
]


def spoilt(x: Tensor) -> Iterator[Tensor]:
    """x with numbers that are none, infinite or large: in a pixel, a channel, a model, all."""
    for number in (INF, -INF, NAN, 3e38):
        for place in ((1, 0, x.shape[2] // 2, 2, 3), (0, 1, x.shape[2] - 1), (1,)):
            other = x.clone()
            other[place] = number
            yield other
    yield (x * 3e37).clamp(-3e38, 3e38)


@pytest.mark.parametrize("first", [one for one in RUNNABLE if one.kind != Kind.DIRECT_BF16])
def test_after_each_convolution_and_activation_numbers_are_torchs(first: Convolution) -> None:
    """A second convolution spreads what is wrong, over all channels of its pixels."""
    x = randn(MODELS, IMAGES, first.channels, *SIZE)
    found = first.by_torch(x)
    second = Convolution(Kind.DIRECT, first.out_channels, 5, 1)
    begin, size = first.step(3), (found.shape[-2], found.shape[-1])
    end = replace(second.step(9, size=size), x=4)
    real: dict[str, Any] = {"channels": first.out_channels, "out_channels": first.out_channels}
    for function in Activation:
        between = Step(
            *(Kind.ACTIVATION, pointwise(found), 3, 4),
            **{"activation": function or Activation.RELU, "scalar": 0.25} | real,
        )
        chain = [begin, between, end]
        if not function:  # relu, in the kernel of the convolution
            chain = [replace(begin, relu=True, out=4), end]
        run = program_of(chain)
        for values in spoilt(x):
            active = FUNCTIONS[function or Activation.RELU](first.by_torch(values))
            assert_as_torch(run(values)[0], second.by_torch(active))


@pytest.fixture
def by_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs return what their kernels compute, whatever that is."""
    monkeypatch.setattr(Program, "_recompute_overflows", lambda *_: None)


def with_relu() -> Iterator[Step]:
    """Steps from the value 0 to 9 that take a relu on, without it."""
    x, (scale, shift) = torch.empty(MODELS, IMAGES, WIDTH, *SIZE), randn(2, MODELS, WIDTH, seed=3)
    for kind in (Kind.DIRECT, Kind.WINOGRAD_2, Kind.WINOGRAD_4, Kind.GROUPED):
        groups = WIDTH if kind == Kind.GROUPED else 1
        yield Convolution(kind, WIDTH, WIDTH, groups=groups).step(9)
    yield Convolution(Kind.STRASSEN, 2 * WIDTH, 2 * PANEL, 1).step(9)
    yield Step(Kind.SUM, pointwise(x), 0, 9, 0)
    for step in (
        affine_step(x, scale, shift),
        group_norm_step(x, scale, shift, 2, 1e-5),
    ):
        yield replace(step, x=0, out=9)


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("step", list(with_relu()), ids=lambda step: step.kind.label)
@pytest.mark.parametrize("number", [-INF, INF, 1e25, -1e25])
def test_relu_turns_large_numbers_into_nan_instead_of_hiding_them(
    step: Step, number: float
) -> None:
    x = randn(MODELS, IMAGES, step.geometry.channels, *SIZE)
    x[1, 0, 3, 2, 1] = number
    (plain,), (found,) = program_of([step])(x), program_of([replace(step, relu=True)])(x)
    large = ~(plain.abs() < LARGE)
    assert bool(large.any())
    assert bool(found[large].isnan().all())
    torch.testing.assert_close(found[~large], plain[~large].relu())


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("number", [-INF, INF, 1e25, -1e25])
def test_max_pooling_turns_large_intermediate_numbers_into_nan_but_not_inputs(
    number: float,
) -> None:
    x = randn(MODELS, IMAGES, WIDTH, *SIZE)
    x[1, 0, 3, 2, 1] = number
    copy = Step(Kind.COPY, pointwise(x), 0, 1)
    pool = replace(max_pool2d_step(x, [3, 2], ONE, NONE), x=1, out=9)
    (within,), (brought,) = program_of([copy, pool])(x), program_of([replace(pool, x=0)])(x)
    expected = pooled(x)
    assert torch.equal(brought, expected)
    assert int(within.isnan().sum()) == 3 * 2
    assert torch.equal(within[~within.isnan()], expected[~within.isnan()])


RELU = Activation.RELU
SPECIAL = [0.0, 1e-40, 1e-30, 0.1, 1.0, 3.0, 6.0, 20.0, 86.9, 87.2, 88.0, 88.5, 88.8, 89.0, 104.0]
SPECIAL += [1e9, 1e19, 1e20, 3e38, INF]


def special(function: Activation, channels: int) -> tuple[Tensor, Step]:
    """All special numbers in each of so many channels, and an activation of them."""
    values = torch.tensor([*SPECIAL, *(-value for value in SPECIAL), NAN])
    x = values.view(1, 1, 1, -1, 1).expand(MODELS, 1, channels, -1, 1)
    step = Step(Kind.ACTIVATION, pointwise(x), 0, 9, activation=function, scalar=0.25)
    return x, replace(step, channels=channels, out_channels=channels)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("channels", [1, 3 * WIDTH])
def test_each_activation_of_special_numbers_is_torchs(function: Activation, channels: int) -> None:
    x, step = special(function, channels)
    (found,) = program_of([step])(x)
    expected = FUNCTIONS[function](x.contiguous())  # torch's gelu of inf depends on the strides
    torch.testing.assert_close(found, expected, **limits(function), equal_nan=True)


def limits(function: Activation) -> dict[str, Any]:
    """torch's gelu cancels where it is small."""
    cancels = function in (Activation.GELU, Activation.GELU_TANH)
    return {"rtol": 1e-6, "atol": 1e-6 if cancels else 0.0}


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_by_its_kernel_is_torchs_below_the_large_numbers_and_nan_from_there(
    function: Activation,
) -> None:
    x, step = special(function, 1)
    (found,) = program_of([step])(x)
    expected = FUNCTIONS[function](x).masked_fill(x.abs() >= LARGE, NAN)
    torch.testing.assert_close(found, expected, **limits(function), equal_nan=True)


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("function", [Activation.TANH, Activation.GELU, Activation.GELU_TANH])
def test_tanh_and_gelu_are_exact_to_a_millionth(function: Activation) -> None:
    _, step = special(function, 1)
    x = torch.linspace(-12, 12, 20_000).view(1, 1, 1, -1, 1).expand(MODELS, 1, 1, -1, 1)
    (found,) = program_of([replace(step, geometry=pointwise(x))])(x)
    exact = FUNCTIONS[function](x.double()).float()
    torch.testing.assert_close(found, exact, **limits(function))
    if function == Activation.TANH:  # never beyond 1
        assert float(found.abs().max()) == 1


@pytest.mark.usefixtures("by_kernels_alone")
@pytest.mark.parametrize("function", [Activation.SIGMOID, Activation.SILU])
def test_sigmoid_and_silu_are_torchs_everywhere(function: Activation) -> None:
    _, step = special(function, 1)
    x = torch.linspace(-110, 110, 20_000).view(1, 1, 1, -1, 1).expand(MODELS, 1, 1, -1, 1)
    (found,) = program_of([replace(step, geometry=pointwise(x))])(x)
    torch.testing.assert_close(found, FUNCTIONS[function](x), rtol=1e-6, atol=1e-44)


def steps_of(kind: Kind) -> Iterator[tuple[list[Step], list[tuple[int, ...]]]]:
    """Operations of a kind, to the value 9, and the shapes of the values 0, 1, ..."""
    for convolution in RUNNABLE:
        if convolution.kind == kind:
            shape = MODELS, IMAGES, convolution.channels, *SIZE
            yield [convolution.step(9)], [shape]
    for channels in (1, 6, 2 * WIDTH + 2):
        yield from pointwise_of(kind, channels)
        yield from others_of(kind, channels)


def pointwise_of(kind: Kind, channels: int) -> Iterator[tuple[list[Step], list[tuple[int, ...]]]]:
    shape = MODELS, IMAGES, channels, *SIZE
    step = Step(kind, pointwise(torch.empty(shape)), 0, 9)
    step = replace(step, channels=channels, out_channels=channels)
    if kind == Kind.ACTIVATION:
        for function in FUNCTIONS:
            yield [replace(step, activation=function, scalar=0.25)], [shape]
    elif kind == Kind.SUM:
        yield [replace(step, other=1, relu=True)], [shape, shape]
    elif kind == Kind.SCALE:
        yield [replace(step, other=1)], [shape, (*shape[:3], 1, 1)]
    elif kind == Kind.COPY:
        total = 3 * channels + 1
        wide = pointwise(torch.empty(MODELS, IMAGES, total, *SIZE)).out_channels
        geometry = replace(step.geometry, out_channels=wide)
        step = replace(step, geometry=geometry, out_channels=total)
        last = replace(step.geometry, channels=in_vectors(geometry).channels)
        pieces = [replace(step, x=index, option=index * channels) for index in range(3)]
        one = pointwise(torch.empty(MODELS, IMAGES, 1, *SIZE))
        end = replace(last, channels=one.channels)
        pieces.append(replace(step, x=3, option=3 * channels, channels=1, geometry=end))
        yield pieces, [shape, shape, shape, (*shape[:2], 1, *SIZE)]


def others_of(kind: Kind, channels: int) -> Iterator[tuple[list[Step], list[tuple[int, ...]]]]:
    shape = MODELS, IMAGES, channels, *SIZE
    x, (scale, shift) = torch.empty(shape), randn(2, MODELS, channels)
    steps: list[Step] = []
    if kind == Kind.AFFINE:
        steps = [affine_step(x, scale, shift)]
    elif kind == Kind.GROUP_NORM:
        groups = {1, channels, 2 if channels % 2 == 0 else 1}
        steps = [group_norm_step(x, scale, shift, each, 1e-2) for each in groups]
    elif kind == Kind.LAYER_NORM:
        steps = [layer_norm_step(x, scale, shift, 1e-2)]
    elif kind == Kind.CHANNEL_CONV:
        steps = [channel_conv_step(x, randn(MODELS, taps), shift[:, :1]) for taps in (1, 3, 9)]
    elif kind == Kind.PIXEL_SHUFFLE and channels > 1:
        blocks = ([1, 2], NONE, [6, 12]), ([2, 1], ONE, [11, 5]), ([1, 1], [2, 0], [5, 6])
        steps = [pixel_shuffle_step(x, *options) for options in blocks]
    elif kind == Kind.RESAMPLE:
        steps = [resample_step(x, [0.0, 0.25, 6.0], [5.0, 4.5, 1.125, 0.0])]
    elif kind == Kind.GATHER:
        taken = [-1, *range(channels)[::-1], 0]
        steps = [gather_step(x, [3, -1, 0], [5, 5, 0, -1], taken)]
    elif kind in (Kind.MAX_POOL, Kind.AVERAGE_POOL):
        pools = product(((3, 2), (2, 2), SIZE), ((2, 2), (1, 3)), (NONE, ONE), (False, True))
        for kernel, stride, padding, ceil in pools:
            if kind == Kind.MAX_POOL:
                steps.append(max_pool2d_step(x, kernel, stride, padding, ceil))
            else:
                options = kernel, stride, padding, ceil
                steps += [average_pool2d_step(x, *options, zeros) for zeros in (True, False)]
    for step in steps:
        yield [replace(step, x=0, out=9)], [shape]


@pytest.mark.parametrize("kind", list(Kind))
def test_the_reference_computes_what_the_kernels_do(kind: Kind) -> None:
    if kind == Kind.DIRECT_BF16 and not any(one.kind == kind for one in RUNNABLE):
        pytest.skip("needs a CPU that multiplies bfloat16")
    count = 0
    for steps, shapes in steps_of(kind):
        inputs = [randn(*shape, seed=index) for index, shape in enumerate(shapes)]
        (found,) = program_of(steps, len(inputs))(*inputs)
        limit = 2e-2 if kind == Kind.DIRECT_BF16 else 1e-5
        assert_as_torch(found, by_reference(steps, *inputs), limit)
        count += 1
    assert count


@pytest.mark.parametrize("convolution", RUNNABLE)
def test_unpacking_inverts_packing(convolution: Convolution) -> None:
    weight = convolution.weight
    if convolution.kind == Kind.DIRECT_BF16:
        weight = weight.bfloat16().float()
    found = unpacked_weight(convolution.step(9, weight))
    assert found is not None
    assert_as_torch(found, weight, 1e-6)


@pytest.mark.parametrize("channels", [1, WIDTH, 2 * WIDTH + 3])
def test_only_images_with_a_large_number_in_an_unpadded_channel_are_marked(channels: int) -> None:
    filled = -(-channels // WIDTH) * WIDTH
    values, marks = torch.full((3, 5, filled), LARGE * 0.999), np.zeros(3, np.uint8)
    values[..., channels:] = NAN

    def marked() -> list[int]:
        marks[:] = 0
        entry_points.mark_overflows(values.data_ptr(), 3, 5, filled, channels, marks)
        return marks.tolist()

    assert marked() == [0, 0, 0]
    for number, channel in product((NAN, INF, -INF, LARGE, -LARGE), range(channels)):
        before = values[1, channel % 5, channel].clone()
        values[1, channel % 5, channel] = number
        assert marked() == [0, 1, 0]
        values[1, channel % 5, channel] = before


def network() -> list[Step]:
    """Residual, squeeze and excitation, concatenation, pooling, selection and a linear layer."""
    first = Convolution(Kind.WINOGRAD_4, WIDTH, WIDTH)
    like = torch.empty(MODELS, IMAGES, WIDTH, *SIZE)
    one = pointwise(like)
    mean = average_pool2d_step(like, SIZE, ONE, NONE, False, False)
    wide = replace(one, out_channels=2 * WIDTH)
    both = torch.empty(MODELS, IMAGES, 2 * WIDTH, *SIZE)
    pool = max_pool2d_step(both, [2, 2], [2, 2], NONE)
    pooled = torch.empty(MODELS, IMAGES, 2 * WIDTH, *pool.geometry.out_size)
    last = Convolution(Kind.DIRECT, 2 * WIDTH, 5, 1)
    return [
        replace(first.step(1), other=0),
        replace(mean, x=1, out=2),
        Step(Kind.ACTIVATION, pointwise(like[..., :1, :1]), 2, 3, activation=SIGMOID),
        Step(Kind.SCALE, one, 1, 4, 3),
        Step(Kind.COPY, wide, 0, 5),
        Step(Kind.COPY, wide, 4, 5, option=WIDTH),
        replace(pool, x=5, out=6),
        replace(gather_step(pooled, [2, 0], [1, -1], range(2 * WIDTH)), x=6, out=7),
        replace(last.step(9, size=(2, 2)), x=7, relu=True),
    ]


SIGMOID = Activation.SIGMOID


def test_through_a_network_numbers_are_torchs() -> None:
    steps = network()
    run = program_of(steps)
    for x in spoilt(randn(MODELS, IMAGES, WIDTH, *SIZE)):
        assert_as_torch(run(x)[0], by_reference(steps, x))


def test_other_images_and_models_keep_their_numbers_to_the_last_bit() -> None:
    run, x = program_of(network()), randn(MODELS, IMAGES, WIDTH, *SIZE)
    (alone,) = run(x)
    x[1, 0, 3, 2, 1] = INF
    (found,) = run(x)
    assert not bool(found[1, 0].isfinite().all())
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1, 1], alone[1, 1])


def test_calls_of_several_threads_that_share_an_input_are_right() -> None:
    steps = network()
    run = program_of(steps, threads=2)
    inputs = [randn(IMAGES, WIDTH, *SIZE, seed=seed) for seed in range(6)]
    for index in (1, 3, 4):
        inputs[index][index % IMAGES, 2, 3, 4] = INF
    expected = [by_reference(steps, x.expand(MODELS, *x.shape)) for x in inputs]
    found = [torch.empty(0)] * len(inputs)
    ready = threading.Barrier(len(inputs))

    def call(index: int) -> None:
        ready.wait()
        (found[index],) = run(inputs[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_as_torch(one, other)


def test_max_pooling_of_minus_infinity_padding_needs_no_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So networks pad that came from TensorFlow."""
    monkeypatch.setattr(program, "Reference", None)
    x = functional.pad(randn(MODELS, IMAGES, WIDTH, *SIZE), (1, 1, 1, 1), value=-INF)
    found = stacked_max_pool2d(x, [3, 3], [2, 2], NONE)
    expected = functional.max_pool2d(x.flatten(0, 1), 3, 2).unflatten(0, (MODELS, IMAGES))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_pooling_of_another_output_hides_no_large_number() -> None:
    """Of an infinity that is wrong, as Winograd's are beside one."""
    first = Convolution(Kind.WINOGRAD_4, WIDTH, WIDTH)
    x = randn(MODELS, IMAGES, WIDTH, *SIZE)
    x[1, 0, 3, 2, 1] = -INF
    pool = max_pool2d_step(x, [3, 2], ONE, NONE)
    run = program_of([first.step(8), replace(pool, x=8, out=9)], outputs=[8, 9])
    expected = first.by_torch(x)
    for found, exact in zip(run(x), (expected, pooled(expected)), strict=True):
        assert_as_torch(found, exact)


def pooled(x: Tensor) -> Tensor:
    return functional.max_pool2d(x.flatten(0, 1), (3, 2), 1).unflatten(0, (MODELS, IMAGES))


def test_padding_channels_need_no_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(program, "Reference", None)
    x, shift = randn(MODELS, IMAGES, 1, *SIZE), torch.full((MODELS, WIDTH), INF)
    step = affine_step(x, torch.ones(MODELS, 1), torch.ones(MODELS, 1))
    shift[:, 0] = 1
    (found,) = program_of([replace(step, x=0, out=9, bias=shift)])(x)
    torch.testing.assert_close(found, x + 1)


@pytest.mark.parametrize("scale", [1e15, 1e17, 1e18, 1e19, 1e25, 3e37])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 4, 2, 3)])
def test_the_group_norm_of_large_numbers_is_torchs_whose_squares_overflow(
    scale: float, order: tuple[int, ...]
) -> None:
    """In whatever order they lie in memory."""
    shape = MODELS, IMAGES, WIDTH, 23, 22
    x = torch.empty([shape[order.index(dim)] for dim in range(5)]).permute(order)
    x.copy_(scale * randn(*shape))
    weight, bias = randn(2, MODELS, WIDTH)
    found = stacked_group_norm(x, weight, bias, 2, 1e-5)
    for index in range(MODELS):
        expected = functional.group_norm(x[index].contiguous(), 2, weight[index], bias[index], 1e-5)
        assert_as_torch(found[index], expected)


@pytest.mark.parametrize("scale", [1e15, 1e18, 1e19, 1e25, 3e37])
@pytest.mark.parametrize("channels", [3, 2 * WIDTH + 1])
def test_the_layer_norm_of_large_numbers_is_torchs_whose_squares_overflow(
    scale: float, channels: int
) -> None:
    x, (weight, bias) = scale * randn(MODELS, IMAGES, channels, *SIZE), randn(2, MODELS, channels)
    found = stacked_layer_norm(x, weight, bias, 1e-5)
    for index in range(MODELS):
        last = x[index].movedim(1, -1).contiguous()
        expected = functional.layer_norm(last, [channels], weight[index], bias[index], 1e-5)
        assert_as_torch(found[index], expected.movedim(-1, 1))


@pytest.mark.parametrize("kind", [Kind.LAYER_NORM, Kind.CHANNEL_CONV, Kind.RESAMPLE])
def test_spoilt_numbers_are_torchs_after_norms_and_resampling(kind: Kind) -> None:
    for steps, (shape,) in steps_of(kind):
        run = program_of(steps)
        for x in spoilt(randn(*shape)):
            assert_as_torch(run(x)[0], by_reference(steps, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_those_of_torch_in_float32(dtype: torch.dtype) -> None:
    kind = next(one.kind for one in reversed(RUNNABLE) if one.kind in (Kind.DIRECT, DIRECT_BF16))
    first = Convolution(kind, 5, 7)
    run = program_of([replace(first.step(9), relu=True)], dtype=dtype)
    x = randn(MODELS, IMAGES, 5, *SIZE).to(dtype)
    x[1, 0, 2, 3, 3], x[0, 1, 2, 3, 3] = INF, -INF
    (found,) = run(x)
    assert found.dtype == dtype
    assert_as_torch(found.float(), first.by_torch(x.float()).relu(), 2e-2)


DIRECT_BF16 = Kind.DIRECT_BF16


@pytest.mark.parametrize("convolution", RUNNABLE)
def test_a_nan_weight_gives_nan_wherever_torch_has_it(
    convolution: Convolution,
) -> None:
    x, weight = randn(MODELS, IMAGES, convolution.channels, *SIZE), convolution.weight
    weight[1, 3, 0, 0, 0] = NAN
    (found,) = program_of([replace(convolution.step(9, weight), relu=True)])(x)
    expected = convolution.by_torch(x, weight)
    assert bool(found[expected.isnan()].isnan().all())
    assert bool(found[0].isfinite().all())
