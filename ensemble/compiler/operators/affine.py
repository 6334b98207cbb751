"""Affine: a scale and a shift per channel, as of a batch norm that no convolution absorbs."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ensemble.compiler.operators import support
from ensemble.compiler.operators.batching import batch_dim_first, expanded
from ensemble.compiler.operators.lowering import with_weights
from ensemble.compiler.operators.single_step import OUT, X, fake_result, padded_values, run
from ensemble.compiler.planning.shape_inference import pointwise, same_size
from ensemble.compiler.planning.step import Kind, Step

# Definition


@custom_op("ensemble::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` per channel: x `(B, C, H, W)`, scale and shift `(C,)`, in float32 or
    wider."""
    return _plain_affine(x, scale, shift)


def _plain_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    result = x.to(scale.dtype) * scale[..., :, None, None] + shift[..., :, None, None]
    return result.to(x.dtype)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


# Batching rule


@affine.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[Tensor, int]:
    x, scale, shift = batch_dim_first(tensors, in_dims)
    is_batched = [dim is not None for dim in in_dims]
    if is_batched[0] and x.dim() == 5 and support.can_run(Kind.AFFINE, x, pointwise(x)):
        scale, shift = expanded((scale, shift), is_batched[1:], info.batch_size)
        return stacked_affine(x, scale, shift), 0
    images = x if is_batched[0] else x.expand(info.batch_size, *x.shape)
    scales, shifts = (
        (t[:, None] if batched else t)
        for t, batched in zip((scale, shift), is_batched[1:], strict=True)
    )
    return _plain_affine(images, scales, shifts), 0


# N models


@custom_op("ensemble::stacked_affine", mutates_args=())
def stacked_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`affine` of N models: x `(N, B, C, H, W)`, scale and shift `(N, C)`."""
    return run(affine_step(x, scale, shift), [x], num_models=len(x))


@stacked_affine.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), same_size(x, x.shape[-3]))


# Lowering


def affine_step(x: Tensor, scale: Tensor, shift: Tensor) -> Step:
    """`stacked_affine` as a step."""
    geometry = pointwise(x)
    weight, bias = (padded_values(tensor, geometry.channels) for tensor in (scale, shift))
    channels = x.shape[-3]
    step = Step(Kind.AFFINE, geometry, X, OUT, None, weight, bias)
    return replace(step, channels=channels, out_channels=channels)


AFFINE = torch.ops.ensemble.affine.default
LOWERINGS = {torch.ops.ensemble.stacked_affine.default: with_weights(affine_step)}


# Reference


def _reference(step: Step, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    scale, shift = (stack[: step.unpadded_channels, None, None] for stack in (weight, bias))
    return x * scale + shift


REFERENCES = {Kind.AFFINE: _reference}
