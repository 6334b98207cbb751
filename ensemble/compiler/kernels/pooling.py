# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Max pooling, in which a NaN of a window comes out, as it does of torch's; and average pooling."""

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
from ensemble.compiler.planning.operation import Geometry

PART = 64  # of a line's pixels: what is added to one sum


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.dilation == (1, 1)


@jit
def _window(step, out_y, out_x):
    """The rows and columns of an output's window that lie in the image: first and end of each."""
    y, x = out_y * step.stride_y - step.pad_y, out_x * step.stride_x - step.pad_x
    bottom, right = min(y + step.kernel_y, step.height), min(x + step.kernel_x, step.width)
    return max(y, 0), bottom, max(x, 0), right


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """A large number within a program comes out as NaN: see `Program`. Not one that a call brings,
    where `option` is set: a network may pad with -inf, lest a border be the largest."""
    lowest = splat(np.float32(-np.inf))
    inside = step.option == 0
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
                        best = maximum_or_nan(bounded_or_nan(value) if inside else value, best)
                store(target + channel, best)


@jit
def sum_of(line, count, stride):
    """The sum of the vectors of a line, `stride` bytes apart.

    Means are sums of the sums of parts of lines: one sum of thousands of pixels would round a
    little further with each of them.
    """
    total = splat(np.float32(0))
    for first in range(0, count, PART):
        part = load(line + first * stride)
        for index in range(first + 1, min(first + PART, count)):
            part = part + load(line + index * stride)
        total = total + part
    return total


@jit
def _length(size, kernel, stride, pad, place):
    """Of a window, without what lies behind the padding."""
    first = place * stride - pad
    return min(first + kernel, size + pad) - first


@jit
def _average(step, x, weight, bias, other, out, scratch, part, parts):
    """The mean of each window; `option`: the zeros of the padding count too."""
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
            share = np.float32(1 / count)
            for channel in range(0, row, VECTOR_BYTES):
                total = splat(np.float32(0))
                for y in range(top, bottom):
                    position = (image * step.height + y) * step.width + left
                    total = total + sum_of(x + position * row + channel, right - left, row)
                store(target + channel, share * total)


MAX_POOL = Kernel(_body, _can_run, lambda geometry: 0)
AVERAGE_POOL = Kernel(_average, _can_run, lambda geometry: 0)
