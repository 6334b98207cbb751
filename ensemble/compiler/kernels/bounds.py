# mypy: ignore-errors
# numba finds the types of these functions, from their arguments.
"""Which images hold a number that is not finite, or large."""

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
def _is_bounded(start, pixels, row, real, sums):
    """Are the first `real` of each pixel's channels below `LARGE`? Pixels lie `row` bytes apart.

    A number is scaled, which makes a large one infinite; 0 times that is 0, or else NaN, and so is
    the sum of all. sums: a vector.
    """
    zero, scale, rest = np.float32(0), np.float32(SCALE), np.float32(0)
    whole = real // WIDTH * VECTOR_BYTES
    total = splat(zero)
    for pixel in range(start, start + pixels * row, row):
        for at in range(pixel, pixel + whole, VECTOR_BYTES):
            total = zero * (scale * load(at)) + total
        for at in range(pixel + whole, pixel + real * FLOAT_BYTES, FLOAT_BYTES):
            rest += zero * (scale * load_float(at))
    store(sums.ctypes.data, total)
    return rest + sums.sum() == 0


@jit
def mark(values, images, pixels, channels, real, marks):
    """Set those of `marks`, a byte for each image, whose image holds a NaN or reaches `LARGE`.

    values: the address of floats, `(images, pixels, channels)`, of whose channels the first `real`
    ones count.
    """
    sums = np.empty(WIDTH, np.float32)
    for image in range(images):
        start, row = values + image * pixels * channels * FLOAT_BYTES, channels * FLOAT_BYTES
        if real == channels:  # as one long row
            bounded = _is_bounded(start, 1, pixels * row, pixels * channels, sums)
        else:
            bounded = _is_bounded(start, pixels, row, real, sums)
        if not bounded:
            marks[image] = 1
