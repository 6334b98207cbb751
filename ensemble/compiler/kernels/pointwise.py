# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Steps that compute each number by itself: sums, factors for channels, batch norms, copies."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    bounded_or_nan,
    load,
    load_float,
    maximum,
    splat,
    store,
    store_float,
)
from ensemble.compiler.kernels.kernel import (
    Kernel,
    jit,
    no_scratch,
    share,
    share_of_vectors,
    takes_pixels,
)


@jit
def _sum(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = share_of_vectors(step, part, parts)
    least = splat(np.float32(0 if step.relu else -np.inf))
    for at in range(first, end, VECTOR_BYTES):
        total = bounded_or_nan(load(x + at) + load(other + at))
        store(out + at, maximum(total, least))


@jit
def _scale(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times one number for each image and channel: other is `(B, 1, 1, C)`."""
    row, pixels = step.channels * FLOAT_BYTES, step.height * step.width
    first, end = share(step.images * pixels, part, parts)
    for pixel in range(first, end):
        at, factors = pixel * row, other + pixel // pixels * row
        for channel in range(0, row, VECTOR_BYTES):
            store(out + at + channel, load(x + at + channel) * load(factors + channel))


@jit
def _affine(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times a factor and plus a summand for each channel, those of the model."""
    row = step.channels * FLOAT_BYTES
    first, end = share(step.images * step.height * step.width, part, parts)
    least = splat(np.float32(0 if step.relu else -np.inf))
    for pixel in range(first, end):
        at = pixel * row
        for channel in range(0, row, VECTOR_BYTES):
            value = load(x + at + channel) * load(weight + channel) + load(bias + channel)
            store(out + at + channel, maximum(bounded_or_nan(value), least))


@jit
def _copy(step, x, weight, bias, other, out, scratch, part, parts):
    """The channels of x that mean something, into those of out from `option` on.

    Behind the last ones zeros fill up the last vector.
    """
    row, out_row = step.channels * FLOAT_BYTES, step.out_channels * FLOAT_BYTES
    whole, rest = step.real // WIDTH * WIDTH, step.out_channels - step.option
    filled = rest if rest - step.real < WIDTH else step.real
    pixels = step.images * step.height * step.width
    if out < x < out + pixels * out_row:  # over what it reads later: in the order of the pixels
        part, parts = (0, 1) if part == 0 else (pixels, 1)
    for pixel in range(part, pixels, parts):
        source, target = x + pixel * row, out + pixel * out_row + step.option * FLOAT_BYTES
        for at in range(0, whole * FLOAT_BYTES, VECTOR_BYTES):
            store(target + at, load(source + at))
        for channel in range(whole, step.real):
            at = channel * FLOAT_BYTES
            store_float(target + at, load_float(source + at))
        for channel in range(step.real, filled):
            store_float(target + channel * FLOAT_BYTES, np.float32(0))


SUM = Kernel(_sum, takes_pixels, no_scratch)
SCALE = Kernel(_scale, takes_pixels, no_scratch)
AFFINE = Kernel(_affine, takes_pixels, no_scratch)
COPY = Kernel(_copy, takes_pixels, no_scratch)
