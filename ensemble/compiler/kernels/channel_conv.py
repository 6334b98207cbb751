# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Convolution along the channels of each pixel, by one filter."""

import numpy as np

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
from ensemble.compiler.kernels.kernel import Kernel, jit, part_range
from ensemble.compiler.planning.step import Geometry


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.kernel[0] == 1


def _scratch_bytes(geometry: Geometry) -> int:
    return (geometry.channels + geometry.kernel[1]) * FLOAT_BYTES


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """Each pixel is copied between zeros, then multiplied tap by tap.

    The filter's taps lie along x of the geometry's kernel, centered.
    """
    row, taps = step.channels * FLOAT_BYTES, step.kernel_x
    copy = scratch + taps // 2 * FLOAT_BYTES
    for at in range(scratch, scratch + row + taps * FLOAT_BYTES, FLOAT_BYTES):
        store_float(at, np.float32(0))
    first, end = part_range(step.images * step.height * step.width, part, parts)
    for pixel in range(first, end):
        source, target = x + pixel * row, out + pixel * row
        for at in range(0, step.unpadded_channels * FLOAT_BYTES, FLOAT_BYTES):
            store_float(copy + at, load_float(source + at))
        for channel in range(0, row, VECTOR_BYTES):
            total = splat(load_float(bias))
            for tap in range(taps):
                at = tap * FLOAT_BYTES
                total = load_float(weight + at) * load(scratch + channel + at) + total
            store(target + channel, total)


CHANNEL_CONV = Kernel(_body, _can_run, _scratch_bytes)
