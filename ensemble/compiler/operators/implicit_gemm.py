"""Convolution on CUDA: `ensemble::conv2d_block` of one model, and of N models by implicit GEMM.

`graph.gemm_selection` selects it. Under `torch.vmap` the batching rule packs the weights of all
models for the Triton kernel of `compiler.cuda`, which runs them in one launch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.cuda.problem import (
    ConvProblem,
    DotPrecision,
    Shortcut,
    packed_shape,
)
from ensemble.compiler.cuda.problem import pack_weight as packed
from ensemble.compiler.cuda.tiles import Tile, default_tile
from ensemble.compiler.operators.activation import activation_of
from ensemble.compiler.operators.batching import batch_dim_first, expanded
from ensemble.compiler.operators.single_step import fake_result
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Activation

# Definition


def plain_conv2d_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    shortcut: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shortcut_stride: Sequence[int],
    activation: int,
) -> Tensor:
    """`activation(conv2d(x) + other + conv2d(shortcut))` of one model by torch's own operators.

    x `(B, C, H, W)` -> `(B, K, OH, OW)`. The filters of the shortcut are of one pixel.
    """
    result = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if other is not None:
        result = result + other
    if shortcut is not None and shortcut_weight is not None:
        result = result + functional.conv2d(
            shortcut, shortcut_weight, shortcut_bias, shortcut_stride
        )
    return activation_of(Activation(activation), result)


conv2d_block = custom_op("ensemble::conv2d_block", mutates_args=())(plain_conv2d_block)
conv2d_block.register_fake(plain_conv2d_block)


# Batching rule


@conv2d_block.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, stride, padding, dilation, groups, shortcut_stride, activation = arguments
    is_batched = [dim is not None for dim in in_dims[:7]]
    x, *others = batch_dim_first(tensors, in_dims)
    weight, bias, other, shortcut, shortcut_weight, shortcut_bias = expanded(
        others, is_batched[1:], info.batch_size
    )
    # Contiguous, also where the models share them: a constant of the graph.
    biases = [t.float().contiguous() for t in (bias, shortcut_bias) if t is not None]
    result = stacked_conv2d_block(
        x,
        pack_block_weight(weight, shortcut_weight, groups),
        sum(biases[1:], biases[0]) if biases else None,
        other,
        shortcut,
        weight.shape[1],
        weight.shape[-2:],
        *(stride, padding, dilation, groups, shortcut_stride, activation),
        str(DotPrecision.IEEE),
        [],
    )
    return result, 0


# N models


@custom_op("ensemble::pack_block_weight", mutates_args=())
def pack_block_weight(weight: Tensor, shortcut: Tensor | None, groups: int) -> Tensor:
    """`(N, K, C, R, S)`, and those of the shortcut -> `compiler.cuda.problem.pack_weight`.

    A separate operator, so that constant folding packs weights once, at build.
    """
    return packed(weight, shortcut, groups)


@pack_block_weight.register_fake
def _(weight: Tensor, shortcut: Tensor | None, groups: int) -> Tensor:
    shortcut_channels = 0 if shortcut is None else shortcut.shape[2]
    return weight.new_empty(packed_shape(weight.shape, groups, shortcut_channels))


@custom_op("ensemble::stacked_conv2d_block", mutates_args=())
def stacked_conv2d_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    shortcut: Tensor | None,
    filters: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shortcut_stride: Sequence[int],
    activation: int,
    precision: str,
    tile: Sequence[int],
) -> Tensor:
    """`conv2d_block` of N models: x `(N, B, C, H, W)`, or `(B, C, H, W)` shared by all.

    weight is the result of `pack_block_weight`, bias `(N, K)` in float32, other and the result
    `(N, B, K, OH, OW)`, shortcut `(N, B, C, H, W)`, precision a `DotPrecision`, tile the fields of
    a `Tile`, or empty for the default.
    """
    from ensemble.compiler.cuda import launch  # Triton may not be installed

    problem = problem_of(
        *(x, weight, bias, other, shortcut, filters, kernel, stride, padding, dilation, groups),
        *(shortcut_stride, activation, precision),
    )
    selected = Tile(*tile) if tile else default_tile(problem, launch.limits_of(x.device))
    return launch.conv2d(problem, selected, x, weight, bias, other, shortcut)


@stacked_conv2d_block.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, other: Any, shortcut: Any, *options: Any) -> Tensor:
    filters, kernel, stride, padding, dilation, *_ = options
    geometry = conv_geometry(x, filters, kernel, stride, padding, dilation)
    return fake_result(x, len(weight), geometry)


def problem_of(*arguments: Any) -> ConvProblem:
    """The sizes of a `stacked_conv2d_block`, by its arguments without the tile."""
    x, weight, _, other, shortcut, filters, *sizes, stride, activation, precision = arguments
    y_stride, x_stride = stride
    return ConvProblem(
        len(weight),
        conv_geometry(x, filters, *sizes),
        x.dtype,
        DotPrecision(precision),
        Activation(activation),
        other is not None,
        None if shortcut is None else Shortcut(shortcut.shape[-3], (y_stride, x_stride)),
    )


CONV2D_BLOCK = torch.ops.ensemble.conv2d_block.default
STACKED_CONV2D_BLOCK = torch.ops.ensemble.stacked_conv2d_block.default
PACK_BLOCK_WEIGHT = torch.ops.ensemble.pack_block_weight.default


def precision_of(node: fx.Node) -> DotPrecision:
    """Of a `stacked_conv2d_block`."""
    return DotPrecision(str(node.args[-2]))
