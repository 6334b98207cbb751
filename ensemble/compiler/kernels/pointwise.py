# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Elementwise kernels: sums, scales per channel, batch norms, copies."""

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
    is_elementwise,
    jit,
    no_scratch,
    part_range,
    vector_range,
)


@jit
def _sum(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = vector_range(step, part, parts)
    lower_bound = splat(np.float32(0 if step.relu else -np.inf))
    for at in range(first, end, VECTOR_BYTES):
        total = bounded_or_nan(load(x + at) + load(other + at))
        store(out + at, maximum(total, lower_bound))


@jit
def _scale(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times a factor per image and channel: other is `(B, 1, 1, C)`."""
    row, pixels = step.channels * FLOAT_BYTES, step.height * step.width
    first, end = part_range(step.images * pixels, part, parts)
    for pixel in range(first, end):
        at, factors = pixel * row, other + pixel // pixels * row
        for channel in range(0, row, VECTOR_BYTES):
            store(out + at + channel, load(x + at + channel) * load(factors + channel))


@jit
def _affine(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times a scale plus a shift per channel of the model."""
    row = step.channels * FLOAT_BYTES
    first, end = part_range(step.images * step.height * step.width, part, parts)
    lower_bound = splat(np.float32(0 if step.relu else -np.inf))
    for pixel in range(first, end):
        at = pixel * row
        for channel in range(0, row, VECTOR_BYTES):
            value = load(x + at + channel) * load(weight + channel) + load(bias + channel)
            store(out + at + channel, maximum(bounded_or_nan(value), lower_bound))


@jit
def _copy(step, x, weight, bias, other, out, scratch, part, parts):
    """The unpadded channels of x, into those of out from `option` on.

    The last copy of a concatenation zeroes the padding of the last vector.
    """
    row, out_row = step.channels * FLOAT_BYTES, step.out_channels * FLOAT_BYTES
    whole, rest = step.unpadded_channels // WIDTH * WIDTH, step.out_channels - step.option
    end = rest if rest - step.unpadded_channels < WIDTH else step.unpadded_channels
    pixels = step.images * step.height * step.width
    if out < x < out + pixels * out_row:  # overlapping, of row tiling: one part copies in order
        part, parts = (0, 1) if part == 0 else (pixels, 1)
    for pixel in range(part, pixels, parts):
        source, target = x + pixel * row, out + pixel * out_row + step.option * FLOAT_BYTES
        for at in range(0, whole * FLOAT_BYTES, VECTOR_BYTES):
            store(target + at, load(source + at))
        for channel in range(whole, step.unpadded_channels):
            at = channel * FLOAT_BYTES
            store_float(target + at, load_float(source + at))
        for channel in range(step.unpadded_channels, end):
            store_float(target + channel * FLOAT_BYTES, np.float32(0))


_ELEMENTWISE = {"is_row_wise": True, "is_in_place": True}
SUM = Kernel(_sum, is_elementwise, no_scratch, fuses_relu=True, **_ELEMENTWISE)
SCALE = Kernel(_scale, is_elementwise, no_scratch, **_ELEMENTWISE)
AFFINE = Kernel(_affine, is_elementwise, no_scratch, fuses_relu=True, **_ELEMENTWISE)
COPY = Kernel(_copy, is_elementwise, no_scratch)
