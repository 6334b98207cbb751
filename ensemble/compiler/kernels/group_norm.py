# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Group norm: all channels of a group over all pixels by their own mean and variance (Wu and He,
Group Normalization, arXiv 1803.08494)."""

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
from ensemble.compiler.kernels.pooling import PART, sum_of
from ensemble.compiler.planning.operation import Geometry
from ensemble.compiler.planning.vector_layout import set_of

LARGEST = float(np.finfo(np.float32).max)


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.kernel == (1, 1)


def _scratch_bytes(geometry: Geometry) -> int:
    return 2 * set_of(*geometry.shares)[0] * VECTOR_BYTES


@jit
def _squares(line, count, stride, mean):
    """The sum of what the vectors of a line differ from a mean, squared; parts as in `sum_of`."""
    total = splat(np.float32(0))
    for first in range(0, count, PART):
        part = splat(np.float32(0))
        for index in range(first, min(first + PART, count)):
            distance = load(line + index * stride) - mean
            part = part + distance * distance
        total = total + part
    return total


@jit
def _spread(sums, first, real, share, number):
    """Put into each channel's place, from the channel `first` on, its group's sum over `number`.

    What fills up vectors, behind the `real` channels, is of no group.
    """
    for begin in range(first, real, share):
        total = 0.0
        for channel in range(begin, begin + share):
            total += load_float(sums + (channel - first) * FLOAT_BYTES)
        for channel in range(begin, begin + share):
            store_float(sums + (channel - first) * FLOAT_BYTES, np.float32(total / number))


@jit
def _to_factors(step, variances, weight, first, count, number):
    """Into each channel's place, from the channel `first` on, what a distance is multiplied by.

    NaN where the squares of a group, of `number` distances, have no finite sum: torch's has none
    either, or the factor would be 0 and hide it.
    """
    for channel in range(first, first + count):
        place, factor = variances + (channel - first) * FLOAT_BYTES, np.float32(0)
        if channel < step.real:
            variance = load_float(place)
            deviation = np.sqrt(variance + step.number)
            factor = np.float32(load_float(weight + channel * FLOAT_BYTES) / deviation)
            if not variance * number < LARGEST:
                factor = np.float32(np.nan)
        store_float(place, factor)


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """Of each image the fewest whole vectors at a time that hold whole groups.

    weight and bias are a factor and a summand of each channel.
    """
    row, pixels = step.channels * FLOAT_BYTES, step.height * step.width
    planes = set_of(step.share, step.share)[0]
    sets = ceil(step.channels, planes * WIDTH)
    least = splat(np.float32(0 if step.relu else -np.inf))
    number = step.share * pixels
    for index in range(part, step.images * sets, parts):
        image, which = divmod(index, sets)
        first = which * planes * WIDTH
        count = min(planes, step.channels // WIDTH - which * planes)
        end = min(step.real, first + planes * WIDTH)
        at = image * pixels * row + first * FLOAT_BYTES
        means, squares = scratch, scratch + planes * VECTOR_BYTES  # then factors
        summands = bias + first * FLOAT_BYTES
        for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
            total = splat(np.float32(0))
            for y in range(step.height):
                total = total + sum_of(x + at + vector + y * step.width * row, step.width, row)
            store(means + vector, total)
        _spread(means, first, end, step.share, number)
        for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
            total, mean = splat(np.float32(0)), load(means + vector)
            for y in range(step.height):
                line = x + at + vector + y * step.width * row
                total = total + _squares(line, step.width, row, mean)
            store(squares + vector, total)
        _spread(squares, first, end, step.share, number)
        _to_factors(step, squares, weight, first, count * WIDTH, number)
        for pixel in range(pixels):
            place = at + pixel * row
            for vector in range(0, count * VECTOR_BYTES, VECTOR_BYTES):
                distance = load(x + place + vector) - load(means + vector)
                value = distance * load(squares + vector) + load(summands + vector)
                store(out + place + vector, maximum(value, least))


GROUP_NORM = Kernel(_body, _can_run, _scratch_bytes)
