# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Resampling: each pixel is a weighted sum of two rows and two columns, as in bilinear
interpolation."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    store,
)
from ensemble.compiler.kernels.kernel import Kernel, jit, no_scratch
from ensemble.compiler.planning.step import Geometry


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.channels == geometry.out_channels


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """weight holds the coordinate of each row, then of each column, in pixels of x."""
    row = step.channels * FLOAT_BYTES
    columns = weight + step.out_height * FLOAT_BYTES
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        at_y = load_float(weight + out_y * FLOAT_BYTES)
        y = np.int64(at_y)
        down = np.float32(at_y - np.float32(y))
        upper = x + (image * step.height + y) * step.width * row
        lower = x + (image * step.height + min(y + 1, step.height - 1)) * step.width * row
        for out_x in range(step.out_width):
            at_x = load_float(columns + out_x * FLOAT_BYTES)
            x_ = np.int64(at_x)
            over = np.float32(at_x - np.float32(x_))
            left, right = x_ * row, min(x_ + 1, step.width - 1) * row
            target = out + (line * step.out_width + out_x) * row
            one = np.float32(1)
            for at in range(0, row, VECTOR_BYTES):
                above = (one - over) * load(upper + left + at) + over * load(upper + right + at)
                below = (one - over) * load(lower + left + at) + over * load(lower + right + at)
                store(target + at, (one - down) * above + down * below)


RESAMPLE = Kernel(_body, _can_run, no_scratch)
