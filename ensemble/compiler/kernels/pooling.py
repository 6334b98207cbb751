# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Max and average pooling. Max pooling propagates NaN, as torch does."""

import numpy as np

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    VECTOR_BYTES,
    WIDTH,
    bounded_or_nan,
    load,
    maximum_or_nan,
    splat,
    store,
)
from ensemble.compiler.kernels.kernel import Kernel, jit
from ensemble.compiler.planning.step import Geometry

BLOCK = 64  # pixels of a line that one partial sum adds


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.dilation == (1, 1)


@jit
def _window(step, out_y, out_x):
    """The rows and columns of an output's window within the image: first and end of each."""
    y, x = out_y * step.stride_y - step.pad_y, out_x * step.stride_x - step.pad_x
    bottom, right = min(y + step.kernel_y, step.height), min(x + step.kernel_x, step.width)
    return max(y, 0), bottom, max(x, 0), right


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """An intermediate large number gives NaN: see `Program`. Not an input of the program, which
    sets `option`: a network may pad with -inf before max pooling."""
    lowest = splat(np.float32(-np.inf))
    is_intermediate = step.option == 0
    row = step.channels * FLOAT_BYTES
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        for out_x in range(step.out_width):
            target = out + (line * step.out_width + out_x) * row
            top, bottom, left, right = _window(step, out_y, out_x)
            for channel in range(0, row, VECTOR_BYTES):
                best = lowest
                for y in range(top, bottom):
                    for x_ in range(left, right):
                        position = (image * step.height + y) * step.width + x_
                        value = load(x + position * row + channel)
                        best = maximum_or_nan(
                            bounded_or_nan(value) if is_intermediate else value, best
                        )
                store(target + channel, best)


@jit
def sum_of(line, count, stride):
    """The sum of the vectors of a line, `stride` bytes apart, by blocks.

    Blocked summation bounds the rounding error: a single sum of thousands of pixels would lose a
    little with each.
    """
    total = splat(np.float32(0))
    for first in range(0, count, BLOCK):
        partial = load(line + first * stride)
        for index in range(first + 1, min(first + BLOCK, count)):
            partial = partial + load(line + index * stride)
        total = total + partial
    return total


@jit
def _length(size, kernel, stride, pad, place):
    """The length of a window, clipped to the padded image."""
    first = place * stride - pad
    return min(first + kernel, size + pad) - first


@jit
def _average(step, x, weight, bias, other, out, scratch, part, parts):
    """The mean of each window; `option`: count_include_pad."""
    row = step.channels * FLOAT_BYTES
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        for out_x in range(step.out_width):
            target = out + (line * step.out_width + out_x) * row
            top, bottom, left, right = _window(step, out_y, out_x)
            count = (bottom - top) * (right - left)
            if step.option != 0:
                count = _length(step.height, step.kernel_y, step.stride_y, step.pad_y, out_y)
                count *= _length(step.width, step.kernel_x, step.stride_x, step.pad_x, out_x)
            factor = np.float32(1 / count)
            for channel in range(0, row, VECTOR_BYTES):
                total = splat(np.float32(0))
                for y in range(top, bottom):
                    position = (image * step.height + y) * step.width + left
                    total = total + sum_of(x + position * row + channel, right - left, row)
                store(target + channel, factor * total)


MAX_POOL = Kernel(_body, _can_run, lambda geometry: 0)
AVERAGE_POOL = Kernel(_average, _can_run, lambda geometry: 0)
