"""Launch the Triton kernels on tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ensemble.compiler.cuda import kernels
from ensemble.compiler.cuda.problem import ConvProblem
from ensemble.compiler.cuda.tiles import Limits, Tile

PROGRAMS_PER_MULTIPROCESSOR = 2  # of the persistent grid; what does not fit waits
SUM_BLOCK = 1024


def limits_of(device: torch.device) -> Limits:
    """The limits of a CUDA device; elsewhere, in Triton's interpreter, those of a small one."""
    if device.type != "cuda":
        return Limits(multiprocessors=4, shared_bytes=99 * 2**10)
    known: Any = torch.cuda.get_device_properties(device)  # torch annotates some of them
    return Limits(known.multi_processor_count, known.shared_memory_per_block_optin)


def conv2d(
    problem: ConvProblem,
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    shortcut: Tensor | None,
) -> Tensor:
    """The convolution of N models.

    Args:
        problem: all sizes.
        tile: how the product is divided.
        x: `(N, B, C, H, W)`, or `(B, C, H, W)` shared by all models.
        weight: see `problem.pack_weight`.
        bias: `(N, K)` in float32.
        other: `(N, B, K, OH, OW)`.
        shortcut: like x.

    Returns:
        `(N, B, K, OH, OW)`, channels-last in memory.
    """
    if not problem.has_few_channels:
        x = _channels_last(x)
    bias = None if bias is None else bias.contiguous()
    other = None if other is None else _channels_last(other).movedim(-3, -1)
    shortcut = None if shortcut is None else _channels_last(shortcut)
    out = x.new_empty(problem.num_models, *problem.geometry.out_shape)
    if tile.splits == 1:
        _launch_gemm(problem, tile, x, weight, bias, other, shortcut, out)
    else:
        partial = x.new_empty(tile.splits, *out.shape, dtype=torch.float32)
        _launch_gemm(problem, tile, x, weight, bias, other, shortcut, partial)
        _launch_sum(problem, tile, partial, bias, other, out)
    return out.movedim(-1, -3)


def _launch_gemm(
    problem: ConvProblem,
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    shortcut: Tensor | None,
    out: Tensor,
) -> None:
    """`kernels.implicit_gemm`: into the result, or into one part of its sum per split."""
    geometry, block_k = problem.geometry, tile.block_k
    channels, taps = geometry.channels_per_group[0], math.prod(geometry.kernel)
    depth, shortcut_depth = problem.depths
    matrix = weight.view(-1, weight.shape[-1])
    programs = PROGRAMS_PER_MULTIPROCESSOR * limits_of(x.device).multiprocessors
    kernels.implicit_gemm[(min(tile.count(problem), programs),)](
        x,
        TensorDescriptor.from_tensor(matrix, [block_k, tile.block_n]),
        bias,
        other,
        shortcut,
        out,
        problem.rows,
        problem.columns,
        channels,
        problem.products,
        *tile.grid(problem),
        *geometry.size,
        *geometry.out_size,
        *_strides(x),
        _model_stride(other),
        0 if shortcut is None else shortcut.shape[-3],
        *((0,) * 4 if shortcut is None else _strides(shortcut)[:4]),
        depth // (taps * block_k),
        depth // block_k,
        shortcut_depth // block_k,
        geometry.groups,
        *geometry.kernel,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        *(problem.shortcut.stride if problem.shortcut else (1, 1)),
        channels if problem.has_few_channels else 0,
        bias is not None,
        other is not None,
        shortcut is not None,
        int(problem.activation),
        tile.block_m,
        tile.block_n,
        block_k,
        tile.splits,
        str(problem.precision),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_sum(
    problem: ConvProblem,
    tile: Tile,
    partial: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    out: Tensor,
) -> None:
    """`kernels.sum_splits`."""
    per_model = math.prod(problem.geometry.out_shape)
    kernels.sum_splits[(-(-per_model // SUM_BLOCK), problem.num_models)](
        partial,
        bias,
        other,
        out,
        per_model,
        problem.geometry.out_channels,
        _model_stride(other),
        tile.splits,
        bias is not None,
        other is not None,
        int(problem.activation),
        SUM_BLOCK,
    )


def _model_stride(other: Tensor | None) -> int:
    return 0 if other is None else other.stride(0)


def _strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a model, an image, a row, a column and a channel."""
    *model, image, channel, row, column = x.stride()
    return (model[0] if model else 0), image, row, column, channel


def _channels_last(x: Tensor) -> Tensor:
    """`(..., B, C, H, W)`, the images of a model contiguous in channels-last; of all models that
    share them (stride 0) only one copy."""
    if x.dim() == 5 and x.stride(0) == 0:
        return _channels_last(x[0]).expand(x.shape)
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)
