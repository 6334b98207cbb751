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
    geometry, dtype = problem.geometry, x.dtype
    num_models, filters = problem.num_models, geometry.out_channels
    out = torch.empty(num_models, *geometry.out_shape, dtype=dtype, device=x.device)
    split = tile.splits > 1
    partial = (
        torch.empty(tile.splits, *out.shape, dtype=torch.float32, device=x.device) if split else out
    )
    if not problem.is_narrow:
        x = _channels_last(x)
    if bias is not None:
        bias = bias.contiguous()  # models may share it by a stride of 0
    if other is not None:
        other = _channels_last(other).movedim(-3, -1)
    if shortcut is not None:
        shortcut = _channels_last(shortcut)
    other_model = other.stride(0) if other is not None else 0
    row_tiles, column_tiles = tile.grid(problem)
    limits = limits_of(x.device)
    programs = min(tile.count(problem), PROGRAMS_PER_MULTIPROCESSOR * limits.multiprocessors)
    depth, shortcut_depth = problem.depths
    block_k = tile.block_k
    per_group = geometry.channels_per_group[0]
    matrix = weight.view(-1, weight.shape[-1])
    kernels.implicit_gemm[(programs,)](
        x,
        TensorDescriptor.from_tensor(matrix, [block_k, tile.block_n]),
        bias,
        other,
        shortcut,
        partial,
        problem.rows,
        problem.columns,
        per_group,
        problem.products,
        row_tiles,
        column_tiles,
        *geometry.size,
        *geometry.out_size,
        *_strides(x),
        other_model,
        shortcut.shape[-3] if shortcut is not None else 0,
        *(_strides(shortcut)[:4] if shortcut is not None else (0,) * 4),
        depth // (geometry.kernel[0] * geometry.kernel[1] * block_k),
        depth // block_k,
        shortcut_depth // block_k,
        geometry.groups,
        *geometry.kernel,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        *(problem.shortcut.stride if problem.shortcut else (1, 1)),
        per_group if problem.is_narrow else 0,
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
    if split:
        per_model = math.prod(geometry.out_shape)
        kernels.sum_splits[(-(-per_model // SUM_BLOCK), num_models)](
            partial,
            bias,
            other,
            out,
            per_model,
            filters,
            other_model,
            tile.splits,
            bias is not None,
            other is not None,
            int(problem.activation),
            SUM_BLOCK,
        )
    return out.movedim(-1, -3)


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
