"""Max and average pooling, and the mean over all pixels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.graph.canonicalize import is_over_pixels
from ensemble.compiler.operators import support
from ensemble.compiler.operators.batching import batch_dim_first
from ensemble.compiler.operators.lowering import (
    Lowering,
    LoweringContext,
    with_value_ids,
    without_weights,
)
from ensemble.compiler.operators.single_step import OUT, X, fake_result, padded_channels, run
from ensemble.compiler.planning.shape_inference import pool_geometry
from ensemble.compiler.planning.step import Kind, Step

# Definitions


@custom_op("ensemble::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`."""
    return plain_max_pool2d(x, kernel, stride, padding, ceil_mode)


def plain_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool2d` by torch's own operator."""
    sizes = list(kernel), list(stride), list(padding)
    return functional.max_pool2d(x, *sizes, ceil_mode=ceil_mode)


@max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return plain_max_pool2d(x, *options)


@custom_op("ensemble::average_pool2d", mutates_args=())
def average_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    """Average pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`."""
    return plain_average_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)


def plain_average_pool2d(x: Tensor, *options: Any) -> Tensor:
    """`average_pool2d` by torch's own operator."""
    kernel, stride, padding, ceil_mode, count_include_pad = options
    sizes = list(kernel), list(stride), list(padding)
    return functional.avg_pool2d(x, *sizes, ceil_mode, count_include_pad)


@average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return plain_average_pool2d(x, *options)


# Batching rules


@max_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = batch_dim_first([x], in_dims)
    if _can_run(Kind.MAX_POOL, x, *options):
        return stacked_max_pool2d(x, *options), 0
    return _without_copies(plain_max_pool2d, x, *options), 0


@average_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = batch_dim_first([x], in_dims)
    if _can_run(Kind.AVERAGE_POOL, x, *options[:-1]):
        return stacked_average_pool2d(x, *options), 0
    return _without_copies(plain_average_pool2d, x, *options), 0


def _can_run(kind: Kind, x: Tensor, *sizes: Any) -> bool:
    """Is x `(N, B, C, H, W)`, and can the kernel pool it?"""
    return x.dim() == 5 and support.can_run(kind, x, pool_geometry(x, *sizes))


def _without_copies(pool: Callable[..., Tensor], x: Tensor, *options: Any) -> Tensor:
    """Pool the images of N models as those of one model: without copying them."""
    if x.dim() == 4:  # the images of a model have no batch dimension
        return pool(x, *options)
    if x.movedim(-3, -1).is_contiguous():  # of the implicit GEMM: N times the images
        return pool(x.flatten(0, 1), *options).unflatten(0, x.shape[:2])
    # A wide or grouped convolution wrote the models among the channels.
    pooled = pool(x.movedim(0, 1).flatten(1, 2), *options)
    return pooled.unflatten(1, (len(x), -1)).movedim(1, 0)


# N models


@custom_op("ensemble::stacked_max_pool2d", mutates_args=())
def stacked_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    step = max_pool2d_step(x, kernel, stride, padding, ceil_mode)
    return run(step, [x], num_models=len(x))


@stacked_max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), pool_geometry(x, *options))


@custom_op("ensemble::stacked_average_pool2d", mutates_args=())
def stacked_average_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    """`average_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    step = average_pool2d_step(x, kernel, stride, padding, ceil_mode, count_include_pad)
    return run(step, [x], num_models=len(x))


@stacked_average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), pool_geometry(x, *options[:-1]))


# Lowering


def max_pool2d_step(x: Tensor, *options: Any) -> Step:
    """`stacked_max_pool2d` as a step."""
    return padded_channels(Step(Kind.MAX_POOL, pool_geometry(x, *options), X, OUT))


def average_pool2d_step(x: Tensor, *options: Any) -> Step:
    """`stacked_average_pool2d` as a step."""
    *sizes, count_include_pad = options
    geometry = pool_geometry(x, *sizes)
    option = int(count_include_pad)
    return padded_channels(Step(Kind.AVERAGE_POOL, geometry, X, OUT, option=option))


def _lower_mean(node: fx.Node, context: LoweringContext) -> list[Step]:
    """The mean over all pixels with keepdim, as average pooling of one window."""
    x, dims, keepdim = (*node.args, False)[:3]
    if not context.is_stack(x) or not keepdim or not is_over_pixels(dims) or node.kwargs:
        return []
    like = context.tensor(x)
    step = average_pool2d_step(like, like.shape[-2:], (1, 1), (0, 0), False, False)
    return [with_value_ids(step, node, context, x)]


MAX_POOL2D = torch.ops.ensemble.max_pool2d.default
AVERAGE_POOL2D = torch.ops.ensemble.average_pool2d.default
LOWERINGS: dict[Any, Lowering] = {
    torch.ops.ensemble.stacked_max_pool2d.default: without_weights(max_pool2d_step),
    torch.ops.ensemble.stacked_average_pool2d.default: without_weights(average_pool2d_step),
    torch.ops.aten.mean.dim: _lower_mean,
}


# Reference


def _max_pool_reference(step: Step, _: None, __: None, x: Tensor) -> Tensor:
    of = step.geometry
    ceil_mode = _has_partial_window(step)
    return functional.max_pool2d(x, of.kernel, of.stride, of.padding, ceil_mode=ceil_mode)


def _average_pool_reference(step: Step, _: None, __: None, x: Tensor) -> Tensor:
    of = step.geometry
    if of.kernel == of.size and of.out_size == (1, 1) and of.padding == (0, 0):
        return x.mean((-2, -1), keepdim=True)
    options = _has_partial_window(step), bool(step.option)
    return functional.avg_pool2d(x, of.kernel, of.stride, of.padding, *options)


def _has_partial_window(step: Step) -> bool:
    """Does the last window reach beyond the padding (ceil_mode)?"""
    of = step.geometry
    return any(
        (count - 1) * stride + taps > length + 2 * pad
        for count, stride, taps, length, pad in zip(
            of.out_size, of.stride, of.kernel, of.size, of.padding, strict=True
        )
    )


REFERENCES = {Kind.MAX_POOL: _max_pool_reference, Kind.AVERAGE_POOL: _average_pool_reference}
