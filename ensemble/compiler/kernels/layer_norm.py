# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Layer norm over the channels of each pixel (Ba and others, arXiv 1607.06450)."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    lane_sum,
    load,
    load_float,
    splat,
    store,
)
from ensemble.compiler.kernels.group_norm import LARGEST
from ensemble.compiler.kernels.kernel import (
    Kernel,
    is_elementwise,
    jit,
    no_scratch,
    part_range,
)


@jit
def _mean(pixel, channels):
    """Of a pixel's channels, without those that fill up the last vector."""
    whole = channels // WIDTH * VECTOR_BYTES
    total = splat(np.float32(0))
    for at in range(pixel, pixel + whole, VECTOR_BYTES):
        total = total + load(at)
    result = lane_sum(total)
    for at in range(pixel + whole, pixel + channels * FLOAT_BYTES, FLOAT_BYTES):
        result += load_float(at)
    return np.float32(result / np.float32(channels))


@jit
def _variance(pixel, channels, mean):
    """Of the same channels: the mean of the squared distances from their mean."""
    whole = channels // WIDTH * VECTOR_BYTES
    center, total = splat(mean), splat(np.float32(0))
    for at in range(pixel, pixel + whole, VECTOR_BYTES):
        distance = load(at) - center
        total = total + distance * distance
    result = lane_sum(total)
    for at in range(pixel + whole, pixel + channels * FLOAT_BYTES, FLOAT_BYTES):
        rest = load_float(at) - mean
        result += rest * rest
    return np.float32(result / np.float32(channels))


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """weight and bias are a scale and a shift per channel.

    NaN where the squared distances overflow: torch's overflow too, or a scale of 0 would hide it.
    NaN also where the square of the mean does, which torch computes where the distances are 0.
    """
    row, channels = step.channels * FLOAT_BYTES, step.unpadded_channels
    first, end = part_range(step.images * step.height * step.width, part, parts)
    for pixel in range(first, end):
        at = pixel * row
        mean = _mean(x + at, channels)
        variance = _variance(x + at, channels, mean)
        factor = np.float32(1 / np.sqrt(variance + step.scalar))
        square = np.float64(mean) * np.float64(mean)
        if not (variance * np.float64(channels) < LARGEST and square < LARGEST):
            factor = np.float32(np.nan)
        center = splat(mean)
        for channel in range(0, row, VECTOR_BYTES):
            scaled = (factor * (load(x + at + channel) - center)) * load(weight + channel)
            store(out + at + channel, scaled + load(bias + channel))


LAYER_NORM = Kernel(_body, is_elementwise, no_scratch, is_row_wise=True, is_in_place=True)
