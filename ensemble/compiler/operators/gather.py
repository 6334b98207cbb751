"""Gather: rows, columns and channels of images, taken independently; -1 stands for zeros.

Slices, shuffles of channels, padding and nearest upsampling are gathers
(`graph.data_movement`).
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


@custom_op("ensemble::gather", mutates_args=())
def gather(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """`x[:, channels][:, :, rows][..., columns]`, zeros for -1: `(B, C, H, W)`."""
    return plain_gather(x, rows, columns, channels)


def plain_gather(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """`gather` by torch's own operators, of `(..., C, H, W)`."""
    result = x
    for dim, wanted in ((-3, channels), (-2, rows), (-1, columns)):
        indices = torch.tensor(wanted, device=x.device, dtype=torch.int64)
        shape = [-1, *[1] * (-1 - dim)]
        result = result.index_select(dim, indices.clamp(min=0))
        if min(wanted) < 0:
            result = result.masked_fill((indices < 0).view(shape), 0)
    return result


@gather.register_fake
def _(x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-3], len(channels), len(rows), len(columns))


# Batching rule


@gather.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *indices: Any) -> Any:
    (x,) = batch_dim_first([x], in_dims)
    if in_dims[0] is None:  # the models share the images
        return gather(x, *indices), None
    if x.dim() == 5 and support.can_run(Kind.GATHER, x, _geometry(x, *indices)):
        return stacked_gather(x, *indices), 0
    return plain_gather(x, *indices), 0


# N models


@custom_op("ensemble::stacked_gather", mutates_args=())
def stacked_gather(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """`gather` of N models: x `(N, B, C, H, W)` -> `(N, B, channels, rows, columns)`."""
    return run(gather_step(x, rows, columns, channels), [x], num_models=len(x))


@stacked_gather.register_fake
def _(x: Tensor, *indices: Any) -> Tensor:
    return fake_result(x, len(x), _geometry(x, *indices))


# Lowering


def gather_step(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Step:
    """`stacked_gather` as a step; its weight is the index table that all models share."""
    geometry = _geometry(x, rows, columns, channels)
    table = support.kernels.index_table(rows, columns, channels)
    step = padded_channels(Step(Kind.GATHER, geometry, X, OUT))
    return replace(step, weight=table.expand(len(x), -1))


def _geometry(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Geometry:
    return replace(same_size(x, len(channels)), out_size=(len(rows), len(columns)))


GATHER = torch.ops.ensemble.gather.default
LOWERINGS = {torch.ops.ensemble.stacked_gather.default: without_weights(gather_step)}


# Reference


def _reference(step: Step, table: Tensor, _: None, x: Tensor) -> Tensor:
    indices = support.kernels.indices_of(table, step.geometry, step.unpadded_out_channels)
    return plain_gather(x, *indices)


REFERENCES = {Kind.GATHER: _reference}
