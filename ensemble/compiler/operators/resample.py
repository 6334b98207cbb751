"""Resampling: bilinear interpolation at any coordinates, rows and columns independently."""

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


@custom_op("ensemble::resample", mutates_args=())
def resample(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """x `(B, C, H, W)` at these coordinates, in pixels: `(B, C, rows, columns)`.

    A coordinate lies between 0 and the last pixel. Between two pixels the result is linear.
    """
    return plain_resample(x, rows, columns)


def plain_resample(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """`resample` by torch's own operators, of `(..., C, H, W)`, computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _between(_between(wide, columns, -1), rows, -2).to(x.dtype)


def _between(x: Tensor, places: Sequence[float], dim: int) -> Tensor:
    at = torch.tensor(places, device=x.device, dtype=torch.float32)
    first = at.long()
    following = (first + 1).clamp(max=x.shape[dim] - 1)
    share = (at - first).to(x.dtype).view(-1, *[1] * (-1 - dim))
    return (1 - share) * x.index_select(dim, first) + share * x.index_select(dim, following)


@resample.register_fake
def _(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    return x.new_empty(*x.shape[:-2], len(rows), len(columns))


# Batching rule


@resample.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *places: Any) -> Any:
    (x,) = batch_dim_first([x], in_dims)
    if in_dims[0] is None:  # the models share the images
        return resample(x, *places), None
    if x.dim() == 5 and support.can_run(Kind.RESAMPLE, x, _geometry(x, *places)):
        return stacked_resample(x, *places), 0
    return plain_resample(x, *places), 0


# N models


@custom_op("ensemble::stacked_resample", mutates_args=())
def stacked_resample(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """`resample` of N models: x `(N, B, C, H, W)` -> `(N, B, C, rows, columns)`."""
    return run(resample_step(x, rows, columns), [x], num_models=len(x))


@stacked_resample.register_fake
def _(x: Tensor, *places: Any) -> Tensor:
    return fake_result(x, len(x), _geometry(x, *places))


# Lowering


def resample_step(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Step:
    """`stacked_resample` as a step; its weight is the coordinates, which all models share."""
    places = torch.tensor([*rows, *columns], device="cpu", dtype=torch.float32)
    step = padded_channels(Step(Kind.RESAMPLE, _geometry(x, rows, columns), X, OUT))
    return replace(step, weight=places.expand(len(x), -1))


def _geometry(x: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Geometry:
    return replace(same_size(x, x.shape[-3]), out_size=(len(rows), len(columns)))


RESAMPLE = torch.ops.ensemble.resample.default
LOWERINGS = {torch.ops.ensemble.stacked_resample.default: without_weights(resample_step)}


# Reference


def _reference(step: Step, places: Tensor, _: None, x: Tensor) -> Tensor:
    rows, columns = places.split(list(step.geometry.out_size))
    return plain_resample(x, rows.tolist(), columns.tolist())


REFERENCES = {Kind.RESAMPLE: _reference}
