"""Pixel shuffle (Shi and others, arXiv 1609.05158): each pixel's channels become a block of pixels.

Channels are ordered by pixel of the block, so a kernel copies contiguous channels. torch's own
order is a permutation of them. A transposed convolution is a convolution, then such a shuffle
(`graph.decomposition`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ensemble.compiler.operators import support
from ensemble.compiler.operators.batching import batch_dim_first
from ensemble.compiler.operators.lowering import without_weights
from ensemble.compiler.operators.single_step import OUT, X, fake_result, padded_channels, run
from ensemble.compiler.planning.shape_inference import same_size
from ensemble.compiler.planning.step import Geometry, Kind, Step

# Definition


@custom_op("ensemble::pixel_shuffle", mutates_args=())
def pixel_shuffle(
    x: Tensor, block: Sequence[int], first: Sequence[int], size: Sequence[int]
) -> Tensor:
    """x `(B, Y * X * C, H, W)`, block `(Y, X)` -> `(B, C, *size)`, from the pixel `first` of x on.

    Pixel (y, x) of the result is channel `(y % Y * X + x % X) * C + c` of pixel
    `first + (y // Y, x // X)`.
    """
    return plain_pixel_shuffle(x, block, first, size).contiguous()


def plain_pixel_shuffle(
    x: Tensor, block: Sequence[int], first: Sequence[int], size: Sequence[int]
) -> Tensor:
    """`pixel_shuffle` by torch's own operators, of `(..., C, H, W)`."""
    height, width = (-(-length // count) for length, count in zip(size, block, strict=True))
    read = x[..., first[0] : first[0] + height, first[1] : first[1] + width]
    parts = read.unflatten(-3, (*block, -1))  # (..., Y, X, C, H, W)
    placed = parts.movedim((-3, -2, -5, -1, -4), (-5, -4, -3, -2, -1))  # (..., C, H, Y, W, X)
    return placed.flatten(-2).flatten(-3, -2)[..., : size[0], : size[1]]


@pixel_shuffle.register_fake
def _(x: Tensor, block: Sequence[int], first: Sequence[int], size: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-3], x.shape[-3] // (block[0] * block[1]), *size)


# Batching rule


@pixel_shuffle.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> Any:
    (x,) = batch_dim_first([x], in_dims)
    if in_dims[0] is None:  # the models share the images
        return pixel_shuffle(x, *options), None
    if x.dim() == 5 and support.can_run(Kind.PIXEL_SHUFFLE, x, _geometry(x, *options)):
        return stacked_pixel_shuffle(x, *options), 0
    return plain_pixel_shuffle(x, *options), 0


# N models


@custom_op("ensemble::stacked_pixel_shuffle", mutates_args=())
def stacked_pixel_shuffle(
    x: Tensor, block: Sequence[int], first: Sequence[int], size: Sequence[int]
) -> Tensor:
    """`pixel_shuffle` of N models: x `(N, B, Y * X * C, H, W)` -> `(N, B, C, *size)`."""
    return run(pixel_shuffle_step(x, block, first, size), [x], num_models=len(x))


@stacked_pixel_shuffle.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return fake_result(x, len(x), _geometry(x, *options))


# Lowering


def pixel_shuffle_step(x: Tensor, *options: Any) -> Step:
    """`stacked_pixel_shuffle` as a step."""
    geometry = _geometry(x, *options)
    step = Step(Kind.PIXEL_SHUFFLE, geometry, X, OUT, option=geometry.out_channels)
    return padded_channels(step)


def _geometry(x: Tensor, block: Sequence[int], first: Sequence[int], size: Sequence[int]) -> Any:
    """The block as its stride, the first pixel as its padding."""
    (blocks_y, blocks_x), (top, left), (height, width) = block, first, size
    plain: Geometry = same_size(x, x.shape[-3] // (blocks_y * blocks_x))
    stride, padding = (int(blocks_y), int(blocks_x)), (int(top), int(left))
    return replace(plain, out_size=(int(height), int(width)), stride=stride, padding=padding)


PIXEL_SHUFFLE = torch.ops.ensemble.pixel_shuffle.default
LOWERINGS = {torch.ops.ensemble.stacked_pixel_shuffle.default: without_weights(pixel_shuffle_step)}


# Reference


def _reference(step: Step, _: None, __: None, x: Tensor) -> Tensor:
    of = step.geometry
    return plain_pixel_shuffle(x, of.stride, of.padding, of.out_size)


REFERENCES = {Kind.PIXEL_SHUFFLE: _reference}
