# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Steps that compute each number by itself: activations, sums, factors for channels, copies."""

import numpy as np

from ensemble.ops.kernels.kernel import Kernel, ceil, jit
from ensemble.ops.operation import Function, Geometry
from ensemble.ops.simd import (
    FLOAT_BYTES,
    PANEL,
    VECTOR_BYTES,
    WIDTH,
    exponential,
    load,
    load_float,
    maximum,
    minimum,
    splat,
    store,
    store_float,
)

RELU, RELU6, SIGMOID, SILU, HARDSIGMOID, HARDSWISH = (int(function) for function in Function)


def _can_run(geometry: Geometry) -> bool:
    return geometry.channels % WIDTH == 0 and geometry.kernel == (1, 1)


def _no_scratch(geometry: Geometry) -> int:
    return 0


@jit
def _sigmoid(x):
    """1 / (1 + exp(-x))."""
    one = splat(np.float32(1))
    return one / (one + exponential(np.float32(-1) * x))


@jit
def _hardsigmoid(x):
    """min(max(x + 3, 0), 6) / 6."""
    shifted = x + splat(np.float32(3))
    return np.float32(1 / 6) * minimum(maximum(shifted, splat(np.float32(0))), splat(np.float32(6)))


@jit
def _share(count, part, parts):
    """The first and the end of a part's share of `count`."""
    each = ceil(count, parts)
    return min(count, part * each), min(count, (part + 1) * each)


@jit
def _vectors(step, part, parts):
    """A part's share of all vectors of an image stack, in bytes."""
    vectors = step.images * step.height * step.width * step.channels // WIDTH
    first, end = _share(vectors, part, parts)
    return first * VECTOR_BYTES, end * VECTOR_BYTES


@jit
def _activate(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = _vectors(step, part, parts)
    function = step.option
    zero, six = splat(np.float32(0)), splat(np.float32(6))
    if function == RELU:
        for at in range(first, end, VECTOR_BYTES):
            store(out + at, maximum(load(x + at), zero))
    elif function == RELU6:
        for at in range(first, end, VECTOR_BYTES):
            store(out + at, minimum(maximum(load(x + at), zero), six))
    elif function == SIGMOID:
        for at in range(first, end, VECTOR_BYTES):
            store(out + at, _sigmoid(load(x + at)))
    elif function == SILU:
        for at in range(first, end, VECTOR_BYTES):
            value = load(x + at)
            store(out + at, value * _sigmoid(value))
    elif function == HARDSIGMOID:
        for at in range(first, end, VECTOR_BYTES):
            store(out + at, _hardsigmoid(load(x + at)))
    else:
        for at in range(first, end, VECTOR_BYTES):
            value = load(x + at)
            store(out + at, value * _hardsigmoid(value))


@jit
def _sum(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = _vectors(step, part, parts)
    least = splat(np.float32(0 if step.relu else -np.inf))
    for at in range(first, end, VECTOR_BYTES):
        store(out + at, maximum(load(x + at) + load(other + at), least))


@jit
def _scale(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times one number for each image and channel: other is `(B, 1, 1, C)`."""
    row, pixels = step.channels * FLOAT_BYTES, step.height * step.width
    first, end = _share(step.images * pixels, part, parts)
    for pixel in range(first, end):
        at, factors = pixel * row, other + pixel // pixels * row
        for channel in range(0, row, VECTOR_BYTES):
            store(out + at + channel, load(x + at + channel) * load(factors + channel))


@jit
def _affine(step, x, weight, bias, other, out, scratch, part, parts):
    """All pixels times a factor and plus a summand for each channel, those of the model."""
    row = step.channels * FLOAT_BYTES
    first, end = _share(step.images * step.height * step.width, part, parts)
    least = splat(np.float32(0 if step.relu else -np.inf))
    for pixel in range(first, end):
        at = pixel * row
        for channel in range(0, row, VECTOR_BYTES):
            value = load(x + at + channel) * load(weight + channel) + load(bias + channel)
            store(out + at + channel, maximum(value, least))


@jit
def _copy(step, x, weight, bias, other, out, scratch, part, parts):
    """The channels of x that mean something, into those of out from `option` on.

    Behind the last ones zeros fill up the last panel.
    """
    row, out_row = step.channels * FLOAT_BYTES, step.out_channels * FLOAT_BYTES
    whole, rest = step.real // WIDTH * WIDTH, step.out_channels - step.option
    filled = rest if rest - step.real < PANEL else step.real
    for pixel in range(part, step.images * step.height * step.width, parts):
        source, target = x + pixel * row, out + pixel * out_row + step.option * FLOAT_BYTES
        for at in range(0, whole * FLOAT_BYTES, VECTOR_BYTES):
            store(target + at, load(source + at))
        for channel in range(whole, step.real):
            at = channel * FLOAT_BYTES
            store_float(target + at, load_float(source + at))
        for channel in range(step.real, filled):
            store_float(target + channel * FLOAT_BYTES, np.float32(0))


ACTIVATION = Kernel(_activate, _can_run, _no_scratch)
SUM = Kernel(_sum, _can_run, _no_scratch)
SCALE = Kernel(_scale, _can_run, _no_scratch)
AFFINE = Kernel(_affine, _can_run, _no_scratch)
COPY = Kernel(_copy, _can_run, _no_scratch)
