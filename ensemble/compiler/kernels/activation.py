# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Activations: a separate step, or the epilogue of another kernel.

They turn large numbers into NaN: see `Program`.
"""

import numpy as np

from ensemble.compiler.codegen.simd import (
    VECTOR_BYTES,
    bounded_or_nan,
    exponential,
    load,
    maximum,
    minimum,
    no_inline,
    splat,
    store,
)
from ensemble.compiler.kernels.kernel import (
    Kernel,
    is_elementwise,
    jit,
    no_scratch,
    vector_range,
)
from ensemble.compiler.planning.step import Activation

NONE, RELU, RELU6, SIGMOID, SILU, HARDSIGMOID, HARDSWISH, LEAKY_RELU = map(int, Activation)


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
def _apply(activation, scalar, value):
    """The activation of a vector."""
    x = bounded_or_nan(value)
    if activation == RELU:
        return maximum(x, splat(np.float32(0)))
    if activation == RELU6:
        return minimum(maximum(x, splat(np.float32(0))), splat(np.float32(6)))
    if activation == SIGMOID:
        return _sigmoid(x)
    if activation == SILU:
        return x * _sigmoid(x)
    if activation == LEAKY_RELU:
        zero = splat(np.float32(0))
        return maximum(x, zero) + np.float32(scalar) * minimum(x, zero)
    if activation == HARDSIGMOID:
        return _hardsigmoid(x)
    return x * _hardsigmoid(x)


@jit
def activate(activation, scalar, source, target, row_bytes, rows, vectors):
    """`rows` rows of so many vectors, `row_bytes` apart, from source to target or in place."""
    no_inline()
    for row in range(rows):
        first = row * row_bytes
        for at in range(first, first + vectors * VECTOR_BYTES, VECTOR_BYTES):
            store(target + at, _apply(activation, scalar, load(source + at)))


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = vector_range(step, part, parts)
    vectors = (end - first) // VECTOR_BYTES
    first_x, first_out, one = x + first, out + first, np.int64(1)
    activate(step.activation, step.scalar, first_x, first_out, np.int64(0), one, vectors)


ACTIVATION = Kernel(_body, is_elementwise, no_scratch, is_row_wise=True, is_in_place=True)
