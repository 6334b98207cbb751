"""Group norm (Wu and He, Group Normalization, arXiv 1803.08494)."""

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


@custom_op("ensemble::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Group norm of one model: x `(B, C, H, W)`, weight and bias `(C,)`."""
    return functional.group_norm(x, groups, weight, bias, eps)


@group_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x)


# Batching rule


@group_norm.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, groups, eps = arguments
    x, weight, bias = batch_dim_first(tensors, in_dims)
    count, is_batched = info.batch_size, [dim is not None for dim in in_dims[:3]]
    images, weight, bias = expanded((x, weight, bias), is_batched, count)
    if images.dim() == 5 and support.can_run(Kind.GROUP_NORM, images, pointwise(images)):
        shape = count, images.shape[-3]
        like: Any = {"dtype": images.dtype, "device": images.device}
        weight = torch.ones(shape, **like) if weight is None else weight
        bias = torch.zeros(shape, **like) if bias is None else bias
        return stacked_group_norm(images, weight, bias, groups, eps), 0
    flat = images.flatten(0, -4)
    result = functional.group_norm(flat, groups, None, None, eps).unflatten(0, images.shape[:-3])
    spread = (..., *[None] * (images.dim() - 4), slice(None), None, None)
    result = result if weight is None else result * weight[spread]
    return (result if bias is None else result + bias[spread]), 0


# N models


@custom_op("ensemble::stacked_group_norm", mutates_args=())
def stacked_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`group_norm` of N models: x `(N, B, C, H, W)`, weight and bias `(N, C)`."""
    return run(group_norm_step(x, weight, bias, groups, eps), [x], num_models=len(x))


@stacked_group_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), same_size(x, x.shape[-3]))


# Lowering


def group_norm_step(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Step:
    """`stacked_group_norm` as a step."""
    per_group = x.shape[-3] // groups
    step = affine_step(x, weight, bias)
    geometry = replace(step.geometry, group_channels=(per_group, per_group))
    return replace(step, kind=Kind.GROUP_NORM, geometry=geometry, scalar=eps)


GROUP_NORM = torch.ops.ensemble.group_norm.default
LOWERINGS = {torch.ops.ensemble.stacked_group_norm.default: with_weights(group_norm_step)}


# Reference


def _reference(step: Step, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    channels = step.unpadded_channels
    groups = channels // step.geometry.channels_per_group[0]
    return functional.group_norm(x, groups, weight[:channels], bias[:channels], step.scalar)


REFERENCES = {Kind.GROUP_NORM: _reference}
