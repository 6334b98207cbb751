# mypy: ignore-errors
# numba infers the types of these functions from their arguments.
"""Which images hold a NaN or a large number."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    SCALE,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    splat,
    store,
)
from ensemble.compiler.kernels.kernel import jit


@jit
def _is_bounded(start, pixels, row, unpadded, sums):
    """Are the first `unpadded` channels of each pixel below `LARGE`? Pixels are `row` bytes apart.

    Scaling makes a large number infinite; 0 times that is NaN, and so is the sum over all numbers.
    Otherwise that sum is 0. sums: one vector.
    """
    zero, scale, rest = np.float32(0), np.float32(SCALE), np.float32(0)
    whole = unpadded // WIDTH * VECTOR_BYTES
    total = splat(zero)
    for pixel in range(start, start + pixels * row, row):
        for at in range(pixel, pixel + whole, VECTOR_BYTES):
            total = zero * (scale * load(at)) + total
        for at in range(pixel + whole, pixel + unpadded * FLOAT_BYTES, FLOAT_BYTES):
            rest += zero * (scale * load_float(at))
    store(sums.ctypes.data, total)
    return rest + sums.sum() == 0


@jit
def mark(values, images, pixels, channels, unpadded, marks):
    """Set the byte in `marks` of each image that holds a NaN or a magnitude from `LARGE` on.

    values: the address of floats, `(images, pixels, channels)`, of which the first `unpadded`
    channels count.
    """
    sums = np.empty(WIDTH, np.float32)
    for image in range(images):
        start, row = values + image * pixels * channels * FLOAT_BYTES, channels * FLOAT_BYTES
        if unpadded == channels:  # one contiguous row
            bounded = _is_bounded(start, 1, pixels * row, pixels * channels, sums)
        else:
            bounded = _is_bounded(start, pixels, row, unpadded, sums)
        if not bounded:
            marks[image] = 1
