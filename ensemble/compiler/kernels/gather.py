# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Gather: rows, columns and channels of images in any order, and zeros between them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    splat,
    store,
    store_float,
)
from ensemble.compiler.kernels.kernel import Kernel, jit, no_scratch
from ensemble.compiler.planning.step import Geometry


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == geometry.out_channels % WIDTH == 0


def index_table(rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]) -> Tensor:
    """The kernel's indices, as floats: rows, columns, vectors of channels, channels; -1: zeros.

    A vector of channels that are contiguous in x has the index of its first channel; others have
    -1, and the kernel reads their channels one by one.
    """
    padded = [*channels, *[-1] * (-len(channels) % WIDTH)]
    vectors = [padded[first : first + WIDTH] for first in range(0, len(padded), WIDTH)]
    contiguous = [
        vector[0] if vector[0] >= 0 and vector == list(range(vector[0], vector[0] + WIDTH)) else -1
        for vector in vectors
    ]
    return torch.tensor([*rows, *columns, *contiguous, *padded], device="cpu", dtype=torch.float32)


def indices_of(table: Tensor, geometry: Geometry, channels: int) -> list[list[int]]:
    """The rows, columns and channels of an `index_table`."""
    rows, columns = geometry.out_size
    vectors = geometry.out_channels // WIDTH
    parts = table.split([rows, columns, vectors, vectors * WIDTH])
    return [part.int().tolist() for part in (parts[0], parts[1], parts[3][:channels])]


@jit
def _entry(table, index):
    return np.int64(load_float(table + index * FLOAT_BYTES))


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """weight is an `index_table`."""
    row, out_row = step.channels * FLOAT_BYTES, step.out_channels * FLOAT_BYTES
    count = step.out_channels // WIDTH
    columns = weight + step.out_height * FLOAT_BYTES
    vectors = columns + step.out_width * FLOAT_BYTES
    channels = vectors + count * FLOAT_BYTES
    zeros = splat(np.float32(0))
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        y = _entry(weight, out_y)
        for out_x in range(step.out_width):
            x_ = _entry(columns, out_x)
            target = out + (line * step.out_width + out_x) * out_row
            if y < 0 or x_ < 0:
                for vector in range(count):
                    store(target + vector * VECTOR_BYTES, zeros)
                continue
            source = x + ((image * step.height + y) * step.width + x_) * row
            for vector in range(count):
                first = _entry(vectors, vector)
                if first >= 0:
                    store(target + vector * VECTOR_BYTES, load(source + first * FLOAT_BYTES))
                    continue
                for channel in range(vector * WIDTH, (vector + 1) * WIDTH):
                    index, value = _entry(channels, channel), np.float32(0)
                    if index >= 0:
                        value = load_float(source + index * FLOAT_BYTES)
                    store_float(target + channel * FLOAT_BYTES, value)


GATHER = Kernel(_body, _can_run, no_scratch)
