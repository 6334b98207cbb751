"""Convolution: `ensemble::conv2d` of one model, and `ensemble::stacked_conv2d` of N models.

Under `torch.vmap` over stacked weights the batching rule takes, on a CPU, the kernel with the least
estimated time, on weights packed for it; on CUDA batched matrix products (`im2col`); elsewhere, as
torch's own rule does, one grouped or one wide convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.graph.analysis import node_of, value_of
from ensemble.compiler.operators import im2col, support
from ensemble.compiler.operators.batching import batch_dim_first
from ensemble.compiler.operators.lowering import with_weights
from ensemble.compiler.operators.single_step import (
    OTHER,
    OUT,
    X,
    fake_result,
    padded_values,
    run,
)
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Geometry, Kind, Step
from ensemble.compiler.planning.vector_layout import conv_in_vectors, weight_in_vectors

# Definition


@custom_op("ensemble::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(conv2d(x) + other)` of one model: x `(B, C, H, W)` -> `(B, K, OH, OW)`."""
    return plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


def plain_conv2d(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
) -> Tensor:
    """`conv2d` by torch's own operators."""
    result = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    result = result if other is None else result + other
    return result.relu() if relu else result


@conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, other: Any, *options: Any) -> Tensor:
    stride, padding, dilation, groups, relu = options
    return plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


# Batching rule


@conv2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, stride, padding, dilation, groups, relu = arguments
    options = stride, padding, dilation
    x, weight, bias, other = batch_dim_first(tensors, in_dims)
    is_batched = [dim is not None for dim in in_dims[:4]]
    if is_batched[1] and bias is not None and not is_batched[2]:  # zeros, where only weights differ
        bias, is_batched[2] = bias.expand(info.batch_size, *bias.shape), True
    if _has_weights_per_model(x, weight, bias, is_batched):
        geometry = conv_geometry(x, weight.shape[1], weight.shape[-2:], *options, groups)
        fused = other is None or _is_like_result(other, x, geometry, is_batched=is_batched[3])
        kind = fastest_kernel(x, geometry)
        if kind is not None:
            epilogue = (other, relu) if fused else (None, False)
            result = _by_kernel(kind, x, weight, bias, *epilogue, *options, groups)
            return (result if fused else _add_and_relu(result, other, is_batched[3], relu)), 0
        if x.device.type == "cuda" and groups == 1 and all(spread == 1 for spread in dilation):
            result = im2col.conv2d(x, weight, stride, padding)
            result = result if bias is None else result + bias[:, None, :, None, None]
            return _add_and_relu(result, other, is_batched[3], relu), 0
    result = _grouped_conv2d(info.batch_size, x, weight, bias, is_batched, options, groups)
    return _add_and_relu(result, other, is_batched[3], relu), 0


def fastest_kernel(x: Tensor, geometry: Geometry) -> Kind | None:
    """The kernel with the least estimated time for a convolution of x; None if no kernel can run
    it. In bfloat16 the direct kernel is the bfloat16 one, where the CPU has it."""
    if not support.is_supported(x):
        return None
    kernels, geometry = support.kernels, conv_in_vectors(geometry)
    bf16 = x.dtype == torch.bfloat16 and kernels.can_run(Kind.DIRECT_BF16, geometry)
    excluded = Kind.DIRECT if bf16 else Kind.DIRECT_BF16
    is_grouped = geometry.groups > 1
    able = [
        kind
        for kind, kernel in kernels.KERNELS.items()
        if kernel.cost
        and (kind == Kind.GROUPED) == is_grouped
        and kind != excluded
        and kernels.can_run(kind, geometry)
    ]
    return kernels.choose(geometry, able) if able else None


def _by_kernel(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    *options: Any,
) -> Tensor:
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    packed = pack_weight(weight, kind, options[-1])
    return stacked_conv2d(x, packed, bias, other, kind, weight.shape[-2:], *options, relu)


def _has_weights_per_model(
    x: Tensor, weight: Tensor, bias: Tensor | None, is_batched: Sequence[bool]
) -> bool:
    """Images with a batch dimension, and a weight and bias per model, all of one dtype?"""
    has_images = x.dim() == (5 if is_batched[0] else 4)
    per_model = is_batched[1] and (bias is None or is_batched[2])
    return has_images and per_model and all(t is None or t.dtype == x.dtype for t in (weight, bias))


def _is_like_result(other: Tensor, x: Tensor, geometry: Geometry, *, is_batched: bool) -> bool:
    """Can the epilogue of a kernel add it: one per model, of the result's shape and dtype?"""
    images, *size, channels = geometry.out_shape
    same_shape = other.shape[1:] == (images, channels, *size)
    return is_batched and same_shape and other.dtype == x.dtype


def _add_and_relu(result: Tensor, other: Tensor | None, is_batched: bool, relu: bool) -> Tensor:
    """`relu(result + other)` per model, other broadcast as for one model."""
    if other is not None:
        rank = max(result.dim() - 1, other.dim() - is_batched)
        result = _with_rank(result, rank) + (_with_rank(other, rank) if is_batched else other)
    return result.relu() if relu else result


def _with_rank(stack: Tensor, rank: int) -> Tensor:
    """`stack`, `(N, *shape)`, with ones before `shape` until it has `rank` dimensions."""
    missing = rank - (stack.dim() - 1)
    return stack[(slice(None), *[None] * missing)]


def _grouped_conv2d(
    num_models: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_batched: Sequence[bool],
    options: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
) -> Tensor:
    """torch's own batching rule: one wide convolution of a shared x, else one grouped by model.

    Result `(N, B, K, OH, OW)`, without B where x has none.
    """
    if x.dim() == (4 if is_batched[0] else 3):
        with_batch = x.unsqueeze(-4)
        arguments = (weight, bias, is_batched, options, groups)
        return _grouped_conv2d(num_models, with_batch, *arguments).squeeze(1)
    if not is_batched[1] and (bias is None or not is_batched[2]):  # all models share the filters
        result = functional.conv2d(x.flatten(0, -4), weight, bias, *options, groups)
        result = result.unflatten(0, x.shape[:-3])
        return result if is_batched[0] else result.expand(num_models, *result.shape)
    weight = weight if is_batched[1] else weight.expand(num_models, *weight.shape)
    if bias is not None:
        bias = (bias if is_batched[2] else bias.expand(num_models, *bias.shape)).flatten()
    if not is_batched[0] and groups > 1:
        x = x.expand(num_models, *x.shape)
    if x.dim() == 5:
        x, groups = x.movedim(0, 1).flatten(1, 2), num_models * groups
    result = functional.conv2d(x, weight.flatten(0, 1), bias, *options, groups)
    return result.unflatten(1, (num_models, -1)).movedim(1, 0)


# N models


@custom_op("ensemble::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, kind: int, groups: int = 1) -> Tensor:
    """`(N, K, C, R, S)` -> the weights of N models in the layout of the kernel `kind`.

    A separate operator, so that constant folding packs weights once, at build.
    """
    padded = weight_in_vectors(weight, Kind(kind), groups)
    return support.kernels.pack(padded, Kind(kind))


@pack_weight.register_fake
def _(weight: Tensor, kind: int, groups: int = 1) -> Tensor:
    padded = weight_in_vectors(weight, Kind(kind), groups)
    return support.kernels.empty_packed(padded, Kind(kind))


@custom_op("ensemble::stacked_conv2d", mutates_args=())
def stacked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor | None,
    kind: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`conv2d` of N models: x `(N, B, C, H, W)`, or `(B, C, H, W)` shared by all.

    weight is the result of `pack_weight`, bias `(N, K)`, other and the result `(N, B, K, OH, OW)`.
    """
    step = conv2d_step(
        x, weight, bias, other, kind, kernel, stride, padding, dilation, groups, relu
    )
    return run(step, [x] if other is None else [x, other], num_models=len(bias))


@stacked_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, other: Any, kind: int, *options: Any) -> Tensor:
    kernel, stride, padding, dilation, *_ = options
    geometry = conv_geometry(x, bias.shape[1], kernel, stride, padding, dilation)
    return fake_result(x, len(bias), geometry)


# Lowering


def conv2d_step(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, kind: int, *options: Any
) -> Step:
    """`stacked_conv2d` as a step from X and OTHER to OUT; x and other may be fake tensors."""
    *sizes, relu = options
    plain = conv_geometry(x, bias.shape[1], *sizes)
    geometry = conv_in_vectors(plain)
    return Step(
        Kind(kind),
        geometry,
        X,
        OUT,
        None if other is None else OTHER,
        weight,
        padded_values(bias, geometry.out_channels),
        relu,
        channels=plain.channels,
        out_channels=plain.out_channels,
    )


CONV2D = torch.ops.ensemble.conv2d.default
STACKED_CONV2D = torch.ops.ensemble.stacked_conv2d.default
PACK_WEIGHT = torch.ops.ensemble.pack_weight.default
LOWERINGS = {STACKED_CONV2D: with_weights(conv2d_step)}


def conv_geometry_of(node: fx.Node) -> Geometry:
    """The geometry of a `stacked_conv2d` node, with its channels padded to vectors."""
    arguments: tuple[Any, ...] = node.args
    x, _, bias, _, _, *sizes, _ = arguments
    return conv_in_vectors(conv_geometry(value_of(x), value_of(bias).shape[1], *sizes))


def with_kernel(node: fx.Node, kind: Kind) -> None:
    """Let a `stacked_conv2d` node, and the packing of its weight, use another kernel."""
    packing = node_of(node.args[1])
    packing.args = (packing.args[0], kind)
    node.args = (*node.args[:4], kind, *node.args[5:])


# Reference


def _reference(
    step: Step, weight: Tensor, bias: Tensor, x: Tensor, other: Tensor | None = None
) -> Tensor:
    geometry = step.geometry
    sizes = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return plain_conv2d(*sizes, False, x, weight, bias[: step.unpadded_out_channels], other)


REFERENCES = dict.fromkeys(
    (
        *(Kind.DIRECT, Kind.DIRECT_BF16, Kind.WINOGRAD_2, Kind.WINOGRAD_4),
        *(Kind.GROUPED, Kind.STRASSEN),
    ),
    _reference,
)
