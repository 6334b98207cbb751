# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Group norm (Wu and He, Group Normalization, arXiv 1803.08494)."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    maximum,
    splat,
    store,
    store_float,
)
from ensemble.compiler.kernels.kernel import Kernel, ceil, jit
from ensemble.compiler.kernels.pooling import BLOCK, sum_of
from ensemble.compiler.planning.step import Geometry
from ensemble.compiler.planning.vector_layout import window_period

LARGEST = float(np.finfo(np.float32).max)


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.kernel == (1, 1)


def _scratch_bytes(geometry: Geometry) -> int:
    return 2 * window_period(*geometry.channels_per_group)[0] * VECTOR_BYTES


@jit
def _squares(line, count, stride, mean):
    """The sum of squared distances of a line's vectors from a mean, by blocks as in `sum_of`."""
    total = splat(np.float32(0))
    for first in range(0, count, BLOCK):
        partial = splat(np.float32(0))
        for index in range(first, min(first + BLOCK, count)):
            distance = load(line + index * stride) - mean
            partial = partial + distance * distance
        total = total + partial
    return total


@jit
def _average_groups(sums, first, end, group_channels, number):
    """Replace each channel's sum, from the channel `first` on, by its group's sum over `number`.

    Padding channels, from `end` on, belong to no group.
    """
    for begin in range(first, end, group_channels):
        total = 0.0
        for channel in range(begin, begin + group_channels):
            total += load_float(sums + (channel - first) * FLOAT_BYTES)
        for channel in range(begin, begin + group_channels):
            store_float(sums + (channel - first) * FLOAT_BYTES, np.float32(total / number))


@jit
def _to_scales(step, variances, weight, first, count, number):
    """Replace each channel's variance, from the channel `first` on, by its scale.

    NaN where the squared distances of a group, `number` of them, overflow: torch's overflow too, or
    a scale of 0 would hide it.
    """
    for channel in range(first, first + count):
        place, scale = variances + (channel - first) * FLOAT_BYTES, np.float32(0)
        if channel < step.unpadded_channels:
            variance = load_float(place)
            deviation = np.sqrt(variance + step.scalar)
            scale = np.float32(load_float(weight + channel * FLOAT_BYTES) / deviation)
            if not variance * number < LARGEST:
                scale = np.float32(np.nan)
        store_float(place, scale)


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """For each image, the fewest whole vectors at a time that hold whole groups.

    weight and bias are a scale and a shift per channel.
    """
    row, pixels = step.channels * FLOAT_BYTES, step.height * step.width
    planes = window_period(step.group_channels, step.group_channels)[0]
    sets = ceil(step.channels, planes * WIDTH)
    lower_bound = splat(np.float32(0 if step.relu else -np.inf))
    number = step.group_channels * pixels
    for index in range(part, step.images * sets, parts):
        image, which = divmod(index, sets)
        first = which * planes * WIDTH
        count = min(planes, step.channels // WIDTH - which * planes)
        end = min(step.unpadded_channels, first + planes * WIDTH)
        at = image * pixels * row + first * FLOAT_BYTES
        means, squares = scratch, scratch + planes * VECTOR_BYTES  # then scales
        shifts = bias + first * FLOAT_BYTES
        for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
            total = splat(np.float32(0))
            for y in range(step.height):
                total = total + sum_of(x + at + vector + y * step.width * row, step.width, row)
            store(means + vector, total)
        _average_groups(means, first, end, step.group_channels, number)
        for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
            total, mean = splat(np.float32(0)), load(means + vector)
            for y in range(step.height):
                line = x + at + vector + y * step.width * row
                total = total + _squares(line, step.width, row, mean)
            store(squares + vector, total)
        _average_groups(squares, first, end, step.group_channels, number)
        _to_scales(step, squares, weight, first, count * WIDTH, number)
        for pixel in range(pixels):
            place = at + pixel * row
            for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
                distance = load(x + place + vector) - load(means + vector)
                value = distance * load(squares + vector) + load(shifts + vector)
                store(out + place + vector, maximum(value, lower_bound))


GROUP_NORM = Kernel(_body, _can_run, _scratch_bytes, fuses_relu=True)
