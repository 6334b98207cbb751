"""Layer norm over the channels of each pixel (Ba and others, arXiv 1607.06450)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.operators import support
from ensemble.compiler.operators.affine import affine_step
from ensemble.compiler.operators.batching import batch_dim_first, expanded
from ensemble.compiler.operators.lowering import with_weights
from ensemble.compiler.operators.single_step import fake_result, run
from ensemble.compiler.planning.shape_inference import pointwise, same_size
from ensemble.compiler.planning.step import Kind, Step

# Definition


@custom_op("ensemble::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of one model over channels: x `(B, C, H, W)`, weight and bias `(C,)`."""
    return _plain_layer_norm(x, weight, bias, eps)


def _plain_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """By torch, of `(..., C, H, W)`; the result has the strides of a contiguous one."""
    last = x.movedim(-3, -1)
    result = functional.layer_norm(last, last.shape[-1:], weight, bias, eps)
    return result.movedim(-1, -3).contiguous()


@layer_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


# Batching rule


@layer_norm.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, eps = arguments
    x, weight, bias = batch_dim_first(tensors, in_dims)
    count, is_batched = info.batch_size, [dim is not None for dim in in_dims[:3]]
    images, weight, bias = expanded((x, weight, bias), is_batched, count)
    if images.dim() == 5 and support.can_run(Kind.LAYER_NORM, images, pointwise(images)):
        shape = count, images.shape[-3]
        like: Any = {"dtype": images.dtype, "device": images.device}
        weight = torch.ones(shape, **like) if weight is None else weight
        bias = torch.zeros(shape, **like) if bias is None else bias
        return stacked_layer_norm(images, weight, bias, eps), 0
    result = _plain_layer_norm(images, None, None, eps)
    spread = (..., *[None] * (images.dim() - 4), slice(None), None, None)
    result = result if weight is None else result * weight[spread]
    return (result if bias is None else result + bias[spread]), 0


# N models


@custom_op("ensemble::stacked_layer_norm", mutates_args=())
def stacked_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` of N models: x `(N, B, C, H, W)`, weight and bias `(N, C)`."""
    return run(layer_norm_step(x, weight, bias, eps), [x], num_models=len(x))


@stacked_layer_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), same_size(x, x.shape[-3]))


# Lowering


def layer_norm_step(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Step:
    """`stacked_layer_norm` as a step."""
    return replace(affine_step(x, weight, bias), kind=Kind.LAYER_NORM, scalar=eps)


LAYER_NORM = torch.ops.ensemble.layer_norm.default
LOWERINGS = {torch.ops.ensemble.stacked_layer_norm.default: with_weights(layer_norm_step)}


# Reference


def _reference(step: Step, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    channels = step.unpadded_channels
    return _plain_layer_norm(x, weight[:channels], bias[:channels], step.scalar)


REFERENCES = {Kind.LAYER_NORM: _reference}
