# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Pixel shuffle: each pixel's channels become a block of pixels."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    store,
    store_float,
)
from ensemble.compiler.kernels.kernel import Kernel, jit, no_scratch
from ensemble.compiler.planning.step import Geometry


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == geometry.out_channels % WIDTH == 0


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """The geometry's stride is the size of a block, its padding the first pixel of x that is read.
    option: the channels of the result, without those that fill up the last vector."""
    row, out_row = step.channels * FLOAT_BYTES, step.out_channels * FLOAT_BYTES
    count, whole = step.option * FLOAT_BYTES, step.option // WIDTH * VECTOR_BYTES
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        y, below = divmod(out_y, step.stride_y)
        start = x + (image * step.height + step.pad_y + y) * step.width * row
        for out_x in range(step.out_width):
            x_, right = divmod(out_x, step.stride_x)
            source = start + (step.pad_x + x_) * row + (below * step.stride_x + right) * count
            target = out + (line * step.out_width + out_x) * out_row
            for at in range(0, whole, VECTOR_BYTES):
                store(target + at, load(source + at))
            for at in range(whole, count, FLOAT_BYTES):
                store_float(target + at, load_float(source + at))
            for at in range(count, out_row, FLOAT_BYTES):
                store_float(target + at, np.float32(0))


PIXEL_SHUFFLE = Kernel(_body, _can_run, no_scratch)
