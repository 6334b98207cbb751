"""Operators, their batching rules and kernels against torch in float64."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.operators import support
from ensemble.compiler.operators.affine import affine, stacked_affine
from ensemble.compiler.operators.channel_conv import channel_conv, stacked_channel_conv
from ensemble.compiler.operators.conv2d import conv2d, pack_weight, stacked_conv2d
from ensemble.compiler.operators.gather import gather, stacked_gather
from ensemble.compiler.operators.group_norm import group_norm, stacked_group_norm
from ensemble.compiler.operators.layer_norm import layer_norm, stacked_layer_norm
from ensemble.compiler.operators.pixel_shuffle import pixel_shuffle, stacked_pixel_shuffle
from ensemble.compiler.operators.pooling import (
    average_pool2d,
    max_pool2d,
    stacked_average_pool2d,
    stacked_max_pool2d,
)
from ensemble.compiler.operators.resample import resample, stacked_resample
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Geometry, Kind, Step

pytest.importorskip("numba")

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import HAS_BF16_DOT, PANEL, WIDTH
from ensemble.compiler.runtime.program import Program

ONE = [1, 1]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor | None,
    relu: bool,
    *options: Any,
) -> Tensor:
    """In float64, by torch, model after model."""
    images = x if x.dim() == 5 else x.expand(len(weight), *x.shape)
    result = torch.stack(
        [
            functional.conv2d(batch.double(), w.double(), b.double(), *options)
            for batch, w, b in zip(images, weight, bias, strict=True)
        ]
    )
    result = result if other is None else result + other
    return result.relu() if relu else result


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", [Kind.DIRECT, Kind.WINOGRAD_2, Kind.WINOGRAD_4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (7, 7), (17, 9), (14, 14)])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("added", [False, True])
def test_each_kernel_computes_a_3x3_convolution_at_any_size(
    kind: int, size: tuple[int, int], images: int, added: bool
) -> None:
    channels, out_channels = 2 * WIDTH, 2 * PANEL
    x = randn(2, images, channels, *size)
    weight, bias = randn(2, out_channels, channels, 3, 3, seed=1) / 9, randn(2, out_channels)
    other = randn(2, images, out_channels, *size, seed=2) if added else None
    packed = pack_weight(weight, kind)
    found = stacked_conv2d(x, packed, bias, other, kind, [3, 3], ONE, ONE, ONE, 1, added)
    assert error(found, exact(x, weight, bias, other, added, ONE, ONE, ONE)) < 1e-5


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "dilation"),
    [
        (3, [7, 7], [2, 2], [3, 3], [1, 1]),  # the first of a ResNet
        (3, [3, 5], [1, 3], [0, 2], [2, 1]),
        (WIDTH, [1, 1], [2, 2], [0, 0], [1, 1]),
        (3 * WIDTH, [3, 3], [2, 1], [1, 0], [1, 1]),
        (WIDTH, [3, 2], [1, 2], [2, 2], [2, 3]),
        (80 * WIDTH, [1, 1], [1, 1], [0, 0], [1, 1]),  # deeper than is multiplied at a time
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_the_direct_kernel_takes_every_geometry(
    channels: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    shared: bool,
) -> None:
    x = randn(2, channels, 12, 11) if shared else randn(3, 2, channels, 12, 11)
    weight, bias = randn(3, PANEL, channels, *kernel, seed=1) / 9, randn(3, PANEL)
    packed = pack_weight(weight, Kind.DIRECT)
    options = stride, padding, dilation
    found = stacked_conv2d(x, packed, bias, None, Kind.DIRECT, kernel, *options, 1, False)
    assert error(found, exact(x, weight, bias, None, False, *options)) < 1e-5


def test_max_pooling_is_torchs_own_and_keeps_minus_infinity_and_nan_where_torch_does() -> None:
    x = randn(2, 3, WIDTH, 9, 8)
    x[0, 0, :, :4, :4] = -torch.inf
    for at in range(9 * 8):  # first, in the middle and last in its windows
        x[at % 2, at % 3, at % WIDTH, at // 8, at % 8] = torch.nan
    found = stacked_max_pool2d(x, [3, 3], [2, 2], [1, 1])
    expected = functional.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, (2, 3))
    assert 0 < int(expected.isnan().sum()) < expected.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_nan_in_the_input_comes_out_as_nan_through_relu() -> None:
    x, weight = torch.full((1, 1, WIDTH, 4, 4), torch.nan), randn(1, PANEL, WIDTH, 3, 3)
    for kind in (Kind.DIRECT, Kind.WINOGRAD_4):
        packed = pack_weight(weight, kind)
        options = ([3, 3], ONE, ONE, ONE, 1, True)
        found = stacked_conv2d(x, packed, torch.zeros(1, PANEL), None, kind, *options)
        assert bool(found.isnan().all())


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (
            conv2d,
            (randn(1, 4, 8, 8), randn(6, 2, 3, 3), None, randn(1, 6, 8, 8), ONE, ONE, ONE, 2, True),
        ),
        (max_pool2d, (randn(1, 4, 8, 8), [3, 3], [2, 2], [1, 1])),
        (average_pool2d, (randn(1, 4, 8, 8), [3, 3], [2, 2], [1, 1], False, False)),
        (gather, (randn(1, 4, 8, 8), [1, -1, 0], [7, 6], [3, 3, 1, 2, -1])),
        (affine, (randn(1, 4, 8, 8), randn(4), randn(4))),
        (group_norm, (randn(2, 6, 3, 3), randn(6), None, 2, 1e-5)),
        (layer_norm, (randn(2, 6, 3, 3), randn(6), None, 1e-5)),
        (channel_conv, (randn(2, 6, 3, 3), randn(3), randn(1))),
        (pixel_shuffle, (randn(2, 12, 3, 3), [2, 3], [0, 1], [5, 4])),
        (resample, (randn(2, 6, 3, 3), [0.0, 1.5], [2.0, 0.25, 1.0])),
        (pack_weight, (randn(2, PANEL, WIDTH, 3, 3), Kind.WINOGRAD_4)),
        (
            stacked_conv2d,
            (
                randn(2, 1, WIDTH, 5, 5),
                pack_weight(randn(2, PANEL, WIDTH, 3, 3), Kind.DIRECT),
                randn(2, PANEL),
                None,
                Kind.DIRECT,
                [3, 3],
                [2, 2],
                ONE,
                ONE,
                1,
                False,
            ),
        ),
        (stacked_max_pool2d, (randn(2, 1, WIDTH, 5, 5), [3, 3], [2, 2], [1, 1], True)),
        (
            stacked_average_pool2d,
            (randn(2, 1, 7, 5, 5), [3, 3], [2, 2], [1, 1], False, True),
        ),
        (stacked_gather, (randn(2, 1, 7, 5, 5), [1, -1], [4, 3, 0], [*range(7), -1])),
        (stacked_group_norm, (randn(2, 1, 6, 5, 5), randn(2, 6), randn(2, 6), 3, 1e-3)),
        (stacked_layer_norm, (randn(2, 1, 6, 5, 5), randn(2, 6), randn(2, 6), 1e-3)),
        (stacked_channel_conv, (randn(2, 1, 6, 5, 5), randn(2, 3), randn(2, 1))),
        (stacked_pixel_shuffle, (randn(2, 1, 12, 5, 5), [2, 3], [0, 1], [9, 10])),
        (stacked_resample, (randn(2, 1, 6, 5, 5), [0.0, 3.5], [4.0, 0.25, 1.0])),
        (stacked_affine, (randn(2, 1, 7, 5, 5), randn(2, 7), randn(2, 7))),
    ],
    ids=lambda value: getattr(value, "_name", None),
)
def test_every_operator_passes_torchs_opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    with torch.inference_mode(False):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("channels", [3, 4, WIDTH])
@pytest.mark.parametrize("out_channels", [6, PANEL])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (None, 0, 0, None), (0, None, None, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vmap_equals_a_loop_for_every_kernel(
    channels: int,
    out_channels: int,
    groups: int,
    in_dims: tuple[int | None, ...],
    dtype: torch.dtype,
) -> None:
    channels *= groups
    stacked = (
        randn(3, 2, channels, 6, 6),
        randn(3, out_channels, channels // groups, 3, 3, seed=1) / 9,
        randn(3, out_channels, seed=2),
        randn(3, 2, out_channels, 6, 6, seed=3),
    )
    tensors = tuple(
        (stack if dim == 0 else stack[0]).to(dtype)
        for stack, dim in zip(stacked, in_dims, strict=True)
    )
    options = (ONE, ONE, ONE, groups, True)
    found = torch.vmap(lambda *each: conv2d(*each, *options), in_dims=in_dims)(*tensors)
    for index in range(3):
        operands = [
            tensor if dim is None else tensor[index]
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        expected = conv2d(*operands, *options).double()
        assert error(found[index].double(), expected) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("share", [1, 2, 3, 8, WIDTH, 24])
@pytest.mark.parametrize("groups", [2, 3, 5])
def test_groups_that_fill_no_panel_equal_a_loop(share: int, groups: int) -> None:
    x, weight = randn(2, 2, share * groups, 6, 6), randn(2, share * groups, share, 3, 3) / 9
    found = torch.vmap(lambda *each: conv2d(*each, None, None, ONE, ONE, ONE, groups, True))(
        x, weight
    )
    bias = torch.zeros(2, share * groups)
    expected = exact(x, weight, bias, None, True, ONE, ONE, ONE, groups)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_and_affine_equal_a_loop(
    in_dims: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    stacked = randn(3, 2, 5, 7, 6).to(dtype), randn(3, 5, seed=1), randn(3, 5, seed=2)
    tensors = [stack if dim == 0 else stack[0] for stack, dim in zip(stacked, in_dims, strict=True)]

    def one(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        changed = affine(x, scale, shift)
        return average_pool2d(changed, [3, 2], [2, 1], [1, 0], False, False)

    found = torch.vmap(one, in_dims)(*tensors)
    for index in range(3):
        operands = [t if d is None else t[index] for t, d in zip(tensors, in_dims, strict=True)]
        expected = one(*operands)
        assert found.dtype == expected.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert error(found[index].double(), expected.double()) < limit


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (6, 3), (32, 32), (40, 5), (72, 3)])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, None), (0, None, None)])
@pytest.mark.parametrize("size", [(1, 2), (7, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_norm_is_that_of_each_model(
    channels: int,
    groups: int,
    in_dims: tuple[int | None, ...],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    stacked = (
        100 + 3 * randn(3, 2, channels, *size),
        randn(3, channels, seed=1),
        randn(3, channels, seed=2),
    )
    tensors = [
        (stack if dim == 0 else stack[0]).to(dtype)
        for stack, dim in zip(stacked, in_dims, strict=True)
    ]
    found = torch.vmap(lambda *each: group_norm(*each, groups, 1e-3).relu(), in_dims)(*tensors)
    for index in range(3):
        operands = [t if d is None else t[index] for t, d in zip(tensors, in_dims, strict=True)]
        x, weight, bias = (operand.double() for operand in operands)
        expected = functional.group_norm(x, groups, weight, bias, 1e-3).relu()
        assert error(found[index].double(), expected) < (3e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_convolutions_over_channels_and_resizing_equal_a_loop(
    in_dims: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    stacked = randn(3, 2, 12, 5, 6), randn(3, 12, seed=1), randn(3, 12, seed=2)
    tensors = [
        (stack if dim == 0 else stack[0]).to(dtype)
        for stack, dim in zip(stacked, in_dims, strict=True)
    ]

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed = layer_norm(x, weight, bias, 1e-3)
        mixed = channel_conv(normed, weight[:5], bias[:1])
        larger = resample(mixed, [0.0, 0.75, 3.5, 4.0], [5.0, 2.25, 2.0])
        return pixel_shuffle(larger, [2, 3], [1, 0], [6, 8])

    found = torch.vmap(one, in_dims)(*tensors)
    for index in range(3):
        operands = [t if d is None else t[index] for t, d in zip(tensors, in_dims, strict=True)]
        expected = one(*(operand.double() for operand in operands))
        assert found.dtype == dtype
        limit = 5e-2 if dtype == torch.bfloat16 else 1e-5
        assert error(found[index].double(), expected) < limit


@pytest.mark.parametrize(
    "other_shape", [(3, PANEL, 1, 1), (3, 6, 6), (3, 1, PANEL, 1, 1), (3,), (3, 3, PANEL, 6, 6)]
)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("x_stacked", [True, False])
def test_a_residual_is_broadcast_per_model(
    other_shape: tuple[int, ...], stacked: bool, x_stacked: bool
) -> None:
    """N, B and some sizes of the residual are all 3, to catch rules that confuse them."""
    x, weight = randn(3, 3, WIDTH, 6, 6), randn(3, PANEL, WIDTH, 3, 3, seed=1) / 9
    other = randn(*other_shape, seed=2)
    in_dims = (0 if x_stacked else None, 0, 0 if stacked else None)
    arguments = (x if x_stacked else x[0], weight, other if stacked else other[0])
    found = torch.vmap(
        lambda x, w, other: conv2d(x, w, None, other, ONE, ONE, ONE, 1, True), in_dims
    )(*arguments)
    for index in range(3):
        operands = [
            t if dim is None else t[index] for t, dim in zip(arguments, in_dims, strict=True)
        ]
        expected = conv2d(operands[0], operands[1], None, operands[2], ONE, ONE, ONE, 1, True)
        assert error(found[index], expected) < 1e-5


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("images", [1, 2])
def test_any_single_argument_may_be_batched(which: int, images: int) -> None:
    tensors = [randn(images, WIDTH, 6, 6), randn(PANEL, WIDTH, 3, 3) / 9, randn(PANEL), None]
    tensors[3] = randn(images, PANEL, 6, 6)
    stacked = randn(4, *tensors[which].shape, seed=7)  # type: ignore[union-attr]
    in_dims = tuple(0 if index == which else None for index in range(4))
    operands = [stacked if index == which else tensor for index, tensor in enumerate(tensors)]
    found = torch.vmap(lambda *each: conv2d(*each, ONE, ONE, ONE, 1, False), in_dims)(*operands)
    for index in range(4):
        operands[which] = stacked[index]
        assert error(found[index], conv2d(*operands, ONE, ONE, ONE, 1, False)) < 1e-5


def test_a_bias_is_read_by_its_strides() -> None:
    x, weight = randn(1, WIDTH, 6, 6), randn(2, PANEL, WIDTH, 3, 3) / 9
    bias = randn(PANEL, 2).T
    packed = pack_weight(weight, Kind.DIRECT)
    options = ([3, 3], ONE, ONE, ONE, 1, False)
    found = stacked_conv2d(x, packed, bias, None, Kind.DIRECT, *options)
    assert error(found, exact(x, weight, bias, None, False, ONE, ONE, ONE)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_do_not_depend_on_torchs_default_dtype(
    dtype: torch.dtype,
) -> None:
    x, weight, bias = randn(1, WIDTH, 6, 6), randn(2, PANEL, WIDTH, 3, 3) / 9, randn(2, PANEL)
    torch.set_default_dtype(dtype)
    try:
        packed = pack_weight(weight, Kind.WINOGRAD_4)
        options = ([3, 3], ONE, ONE, ONE, 1, False)
        found = stacked_conv2d(x, packed, bias, None, Kind.WINOGRAD_4, *options)
        pooled = stacked_max_pool2d(found, [2, 2], [2, 2], [0, 0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == pooled.dtype == torch.float32
    assert error(found, exact(x, weight, bias, None, False, ONE, ONE, ONE)) < 1e-5
    expected = functional.max_pool2d(found.flatten(0, 1), 2).unflatten(0, (2, 1))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3, WIDTH // 2, WIDTH, 3 * WIDTH // 2, 2 * WIDTH])
@pytest.mark.parametrize("out_channels", [PANEL, PANEL + 8])
@pytest.mark.parametrize("size", [6, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batching_rule_selects_a_kernel_that_supports_the_channels(
    channels: int, out_channels: int, size: int, dtype: torch.dtype
) -> None:
    x = randn(2, 1, channels, size, size).to(dtype)
    weight = (randn(2, out_channels, channels, 3, 3, seed=1) / 9).to(dtype)
    bias = randn(2, out_channels, seed=2).to(dtype)
    mapped = torch.vmap(lambda *each: conv2d(*each, None, ONE, ONE, ONE, 1, False))
    found = mapped(x, weight, bias).double()
    expected = exact(x, weight, bias, None, False, ONE, ONE, ONE)
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_program_refuses_a_step_that_its_kernel_cannot_run(kind: Kind) -> None:
    few = Geometry(1, WIDTH + 1, (8, 8), PANEL + 1, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match=f"no kernel: {re.escape(kind.label)} of Geometry"):
        Program(
            [Step(kind, few, 0, 1)],
            inputs=[0],
            outputs=[1],
            num_models=1,
            threads=1,
            dtype=torch.float32,
        )


def test_without_numba_every_convolution_takes_torchs_batching_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(support, "kernels", None)
    x, weight, bias = randn(1, WIDTH, 6, 6), randn(2, PANEL, WIDTH, 3, 3), randn(2, PANEL)
    mapped = torch.vmap(lambda weight, bias: conv2d(x, weight, bias, None, ONE, ONE, ONE, 1, False))
    assert error(mapped(weight, bias), exact(x, weight, bias, None, False, ONE, ONE, ONE)) < 1e-5


@pytest.mark.parametrize("num_models", [1, 2, 3, 5])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_program_gives_the_same_for_any_number_of_threads(num_models: int, threads: int) -> None:
    """Two convolutions, the second with a residual, pooling, a mean and a linear layer; models left
    over too."""
    first = Geometry(2, 3, (13, 11), PANEL, (13, 11), (3, 3), (1, 1), (1, 1), (1, 1))
    second = Geometry(2, PANEL, (13, 11), PANEL, (13, 11), (3, 3), (1, 1), (1, 1), (1, 1))
    pooled = Geometry(2, PANEL, (13, 11), PANEL, (7, 6), (3, 3), (2, 2), (1, 1), (1, 1))
    means = Geometry(2, PANEL, (7, 6), PANEL, (1, 1), (7, 6), (1, 1), (0, 0), (1, 1))
    top = Geometry(2, PANEL, (1, 1), PANEL, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    w1, w2 = randn(num_models, PANEL, 3, 3, 3), randn(num_models, PANEL, PANEL, 3, 3) / 9
    w3, b = randn(num_models, PANEL, PANEL), randn(num_models, PANEL, seed=4)
    program = Program(
        [
            Step(Kind.DIRECT, first, 0, 1, None, pack_weight(w1, Kind.DIRECT), b, True),
            Step(Kind.WINOGRAD_4, second, 1, 2, 1, pack_weight(w2, Kind.WINOGRAD_4), b, True),
            Step(Kind.MAX_POOL, pooled, 2, 3),
            Step(Kind.AVERAGE_POOL, means, 3, 4),
            Step(
                *(Kind.DIRECT, top, 4, 5, None),
                pack_weight(w3[..., None, None], Kind.DIRECT),
                b,
            ),
        ],
        inputs=[0],
        outputs=[2, 5],
        num_models=num_models,
        threads=threads,
        dtype=torch.float32,
    )
    x = randn(2, 3, 13, 11, seed=5)
    one = exact(x, w1, b, None, True, ONE, ONE, ONE)
    two = exact(one, w2, b, one, True, ONE, ONE, ONE)
    mean = functional.max_pool2d(two.flatten(0, 1), 3, 2, 1).mean((-2, -1))
    three = torch.einsum("nbc,nkc->nbk", mean.unflatten(0, (num_models, 2)), w3.double())
    for _ in range(3):
        found = program(x)
        assert error(found[0], two) < 1e-5
        assert error(found[1].flatten(-3), three + b[:, None]) < 1e-5


def geometry(channels: int, size: int, images: int = 1, stride: int = 1) -> Geometry:
    out = (size - 1) // stride + 1
    return Geometry(
        images,
        channels,
        (size, size),
        channels,
        (out, out),
        (3, 3),
        (stride, stride),
        (1, 1),
        (1, 1),
    )


def chosen(geometry: Geometry, direct: Kind = Kind.DIRECT) -> Kind:
    tiled = [kind for kind in (Kind.WINOGRAD_2, Kind.WINOGRAD_4) if kernels.can_run(kind, geometry)]
    return kernels.choose(geometry, [direct, *tiled])


def test_the_cost_model_prefers_large_tiles_unless_weight_traffic_dominates() -> None:
    assert chosen(geometry(64, 56)) == chosen(geometry(128, 28)) == Kind.WINOGRAD_4
    assert chosen(geometry(256, 14)) == Kind.WINOGRAD_4
    assert chosen(geometry(512, 7)) == Kind.WINOGRAD_2
    assert chosen(geometry(512, 7, images=8)) == Kind.WINOGRAD_4
    assert chosen(geometry(512, 2)) == Kind.DIRECT
    assert chosen(geometry(64, 56, stride=2)) == Kind.DIRECT


def test_the_cost_model_selects_strassen_for_large_1x1_convolutions() -> None:
    def rule(channels: int, out_channels: int, size: int) -> Kind:
        plain = Geometry(
            *(1, channels, (size, size), out_channels, (size, size)),
            *((1, 1), (1, 1), (0, 0), (1, 1)),
        )
        return kernels.choose(plain, [Kind.DIRECT, Kind.STRASSEN])

    assert rule(256, 256, 56) == rule(1024, 512, 14) == rule(2048, 1024, 7) == Kind.STRASSEN
    assert rule(64, 64, 56) == Kind.DIRECT
    assert rule(2048, 1024, 1) == Kind.DIRECT  # 7/4 of the weights would have to be read


@pytest.mark.parametrize("channels", [2 * WIDTH, 64 * WIDTH])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 7), (15, 28)])
@pytest.mark.parametrize("stride", [1, 2])
def test_strassens_algorithm_computes_a_1x1_convolution(
    channels: int, size: tuple[int, int], stride: int
) -> None:
    x = randn(2, 2, channels, *size)
    weight, bias = randn(2, 4 * PANEL, channels, 1, 1, seed=1) / channels**0.5, randn(2, 4 * PANEL)
    options = [stride, stride], [0, 0], ONE
    expected = exact(x, weight, bias, None, False, *options)
    other = randn(*expected.shape, seed=2)
    packed = pack_weight(weight, Kind.STRASSEN)
    found = stacked_conv2d(x, packed, bias, other, Kind.STRASSEN, ONE, *options, 1, True)
    assert error(found, (expected + other).relu()) < 2e-6


@pytest.mark.parametrize("kind", [kind for kind, kernel in kernels.KERNELS.items() if kernel.cost])
@pytest.mark.parametrize("size", [3, 7])
def test_images_of_a_batch_do_not_affect_each_other(kind: Kind, size: int) -> None:
    """A NaN of one, or numbers so large that the rounding of others would be lost in theirs."""
    groups = PANEL if kind == Kind.GROUPED else 1
    side = 3 if groups > 1 or kind in (Kind.WINOGRAD_2, Kind.WINOGRAD_4) else 1
    x, weight = randn(1, 4, PANEL, size, size), randn(1, 2 * PANEL, PANEL // groups, side, side)
    weight = weight[:, :PANEL] if groups > 1 else weight
    bias = randn(1, weight.shape[1])
    packed = pack_weight(weight, kind, groups)
    sizes = [side, side], ONE, [side // 2, side // 2], ONE, groups
    if not support.can_run(kind, x, conv_geometry(x, weight.shape[1], *sizes)):
        pytest.skip(f"{kind.label}: not on this CPU")
    alone = stacked_conv2d(x, packed, bias, None, kind, *sizes, False)
    for factor in (1e8, float("inf"), float("nan")):
        beside = x.clone()
        beside[:, 1] *= factor
        found = stacked_conv2d(beside, packed, bias, None, kind, *sizes, False)
        assert error(found[:, [0, 2, 3]], alone[:, [0, 2, 3]]) < 1e-6


@pytest.mark.parametrize("size", [(64, 64), (1, 40_000), (448, 448)])
def test_the_mean_of_many_equal_pixels_is_their_value(size: tuple[int, int]) -> None:
    value = torch.full((1, 1, PANEL, *size), 0.7)
    mean = stacked_average_pool2d(value, size, ONE, [0, 0], False, False)
    torch.testing.assert_close(mean.flatten(), value.flatten()[:PANEL], rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [share for share in (1, 2, 4, 8, 16, 32) if PANEL % share == 0])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [([3, 3], ONE, ONE, ONE), ([3, 3], [2, 2], ONE, ONE), ([5, 2], [1, 2], [2, 3], [1, 2])],
)
@pytest.mark.parametrize("size", [(3, 5), (29, 30)])
def test_the_grouped_kernel_takes_every_geometry(
    share: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: tuple[int, int],
) -> None:
    x, bias = randn(2, 2, 2 * PANEL, *size), randn(2, 2 * PANEL)
    weight = randn(2, 2 * PANEL, share, *kernel, seed=1) / 9
    options = stride, padding, dilation, 2 * PANEL // share
    expected = exact(x, weight, bias, None, False, *options)
    other = randn(*expected.shape, seed=2)
    packed = pack_weight(weight, Kind.GROUPED, options[-1])
    found = stacked_conv2d(x, packed, bias, other, Kind.GROUPED, kernel, *options, True)
    assert error(found, (expected + other).relu()) < 1e-6


def test_in_bfloat16_the_cost_model_selects_winograd_only_for_large_savings() -> None:
    bf16 = Kind.DIRECT_BF16
    assert chosen(geometry(64, 56), bf16) == Kind.WINOGRAD_4
    assert chosen(geometry(512, 7), bf16) == bf16
    assert chosen(geometry(64, 56, stride=2), bf16) == bf16


@pytest.mark.skipif(not HAS_BF16_DOT, reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize("channels", [1, 3, 2 * WIDTH, 4 * WIDTH])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_direct_convolution_in_bfloat16_rounds_its_inputs_only(
    channels: int, kernel: tuple[int, int], stride: int
) -> None:
    x, other = randn(2, 2, channels, 9, 11).bfloat16(), None
    weight = randn(2, PANEL, channels, *kernel, seed=1).bfloat16()
    bias = randn(2, PANEL, seed=2).bfloat16()
    options = [stride, stride], [kernel[0] // 2, kernel[1] // 2], ONE
    packed = pack_weight(weight, Kind.DIRECT_BF16)
    found = stacked_conv2d(x, packed, bias, other, Kind.DIRECT_BF16, kernel, *options, 1, True)
    assert found.dtype == torch.bfloat16
    assert error(found, exact(x, weight, bias, other, True, *options)) < 2**-8
