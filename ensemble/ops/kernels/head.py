# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""The mean over all pixels, then a linear layer: what a ResNet ends with."""

import numpy as np

from ensemble.ops.kernels.kernel import Kernel, ceil, jit, multiply_floats
from ensemble.ops.kernels.pooling import sum_of
from ensemble.ops.operation import Geometry
from ensemble.ops.simd import (
    FLOAT_BYTES,
    MAX_ROWS,
    PANEL,
    VECTOR_BYTES,
    WIDTH,
    load_float,
    splat,
    store,
    store_float,
)


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0


def _scratch_bytes(geometry: Geometry) -> int:
    return MAX_ROWS * (PANEL + geometry.channels) * FLOAT_BYTES + 4 * VECTOR_BYTES


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """The mean over all pixels, then a linear layer: `(B, H, W, C)` -> `(B, out_channels)`.

    weight is `(panels, C, PANEL)` and bias `(panels * PANEL)`, filled up with zeros.
    """
    means = scratch + MAX_ROWS * PANEL * FLOAT_BYTES
    pixels = step.height * step.width
    row_bytes = step.channels * FLOAT_BYTES
    for first in range(0, step.images, MAX_ROWS):
        rows = min(MAX_ROWS, step.images - first)
        for row in range(rows):
            source = x + (first + row) * pixels * row_bytes
            for channel in range(0, row_bytes, VECTOR_BYTES):
                total = splat(np.float32(0))
                for y in range(step.height):
                    line = source + y * step.width * row_bytes + channel
                    total = total + sum_of(line, step.width, row_bytes)
                target = means + channel * rows + row * VECTOR_BYTES
                store(target, np.float32(1 / pixels) * total)
        for panel in range(part, ceil(step.out_channels, PANEL), parts):
            factors = weight + panel * row_bytes * PANEL
            start = bias + panel * PANEL * FLOAT_BYTES
            panel_bytes = PANEL * FLOAT_BYTES
            ahead, depth = parts * row_bytes * PANEL, step.channels
            multiply_floats(rows, means, factors, scratch, panel_bytes, depth, start, ahead)
            for row in range(rows):
                target = out + ((first + row) * step.out_channels + panel * PANEL) * FLOAT_BYTES
                for column in range(min(PANEL, step.out_channels - panel * PANEL)):
                    value = load_float(scratch + (row * PANEL + column) * FLOAT_BYTES)
                    store_float(target + column * FLOAT_BYTES, value)


HEAD = Kernel(_body, _can_run, _scratch_bytes)
