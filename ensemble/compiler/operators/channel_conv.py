"""Convolution along the channels of each pixel, by one filter: efficient channel attention (Wang
and others, ECA-Net, arXiv 1910.03151)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.operators import support
from ensemble.compiler.operators.batching import batch_dim_first, expanded
from ensemble.compiler.operators.lowering import with_weights
from ensemble.compiler.operators.single_step import OUT, X, fake_result, run
from ensemble.compiler.planning.shape_inference import pointwise, same_size
from ensemble.compiler.planning.step import Geometry, Kind, Step

# Definition


@custom_op("ensemble::channel_conv", mutates_args=())
def channel_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `(B, C, H, W)`, convolved along C by weight `(taps,)`, an odd number, padded by zeros so
    that C stays, plus bias `(1,)`."""
    return _plain_channel_conv(x, weight, bias)


def _plain_channel_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    last = x.movedim(1, -1)
    lines = last.reshape(-1, 1, last.shape[-1])
    result = functional.conv1d(lines, weight[None, None], bias, padding=len(weight) // 2)
    return result.view(last.shape).movedim(-1, 1).contiguous()


@channel_conv.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


# Batching rule


@channel_conv.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[Tensor, int]:
    is_batched = [dim is not None for dim in in_dims]
    operands = batch_dim_first(tensors, in_dims)
    images, weight, bias = expanded(operands, is_batched, info.batch_size)
    geometry = _geometry(images, weight.shape[1])
    if images.dim() == 5 and support.can_run(Kind.CHANNEL_CONV, images, geometry):
        if bias is None:
            bias = torch.zeros(info.batch_size, 1, dtype=images.dtype, device=images.device)
        return stacked_channel_conv(images, weight, bias), 0
    biases = [None] * info.batch_size if bias is None else bias
    models = zip(images, weight, biases, strict=True)
    return torch.stack([_plain_channel_conv(*model) for model in models]), 0


# N models


@custom_op("ensemble::stacked_channel_conv", mutates_args=())
def stacked_channel_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`channel_conv` of N models: x `(N, B, C, H, W)`, weight `(N, taps)`, bias `(N, 1)`."""
    return run(channel_conv_step(x, weight, bias), [x], num_models=len(x))


@stacked_channel_conv.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), same_size(x, x.shape[-3]))


# Lowering


def channel_conv_step(x: Tensor, weight: Tensor, bias: Tensor) -> Step:
    """`stacked_channel_conv` as a step."""
    geometry, channels = _geometry(x, weight.shape[1]), x.shape[-3]
    taps, biases = weight.float().contiguous(), bias.float().contiguous()
    step = Step(Kind.CHANNEL_CONV, geometry, X, OUT, None, taps, biases)
    return replace(step, channels=channels, out_channels=channels)


def _geometry(x: Tensor, taps: int) -> Geometry:
    return replace(pointwise(x), kernel=(1, taps))


CHANNEL_CONV = torch.ops.ensemble.channel_conv.default
LOWERINGS = {torch.ops.ensemble.stacked_channel_conv.default: with_weights(channel_conv_step)}


# Reference


def _reference(step: Step, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return _plain_channel_conv(x, weight, bias)


REFERENCES = {Kind.CHANNEL_CONV: _reference}
