# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Activations: steps by themselves, or done to what a kernel has just written.

What they make of large numbers is NaN: see `Program`.
"""

import numpy as np

from ensemble.compiler.codegen.simd import (
    VECTOR_BYTES,
    bounded_or_nan,
    exponential,
    load,
    maximum,
    minimum,
    splat,
    stand_alone,
    store,
)
from ensemble.compiler.kernels.kernel import (
    Kernel,
    jit,
    no_scratch,
    share_of_vectors,
    takes_pixels,
)
from ensemble.compiler.planning.operation import Function

NONE, RELU, RELU6, SIGMOID, SILU, HARDSIGMOID, HARDSWISH, LEAKY_RELU = map(int, Function)


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
def _of(function, number, value):
    x = bounded_or_nan(value)
    if function == RELU:
        return maximum(x, splat(np.float32(0)))
    if function == RELU6:
        return minimum(maximum(x, splat(np.float32(0))), splat(np.float32(6)))
    if function == SIGMOID:
        return _sigmoid(x)
    if function == SILU:
        return x * _sigmoid(x)
    if function == LEAKY_RELU:
        zero = splat(np.float32(0))
        return maximum(x, zero) + np.float32(number) * minimum(x, zero)
    if function == HARDSIGMOID:
        return _hardsigmoid(x)
    return x * _hardsigmoid(x)


@jit
def activate(function, number, source, target, row_bytes, rows, vectors):
    """`rows` rows of so many vectors, `row_bytes` apart, from source to target: may be the same."""
    stand_alone()
    for row in range(rows):
        first = row * row_bytes
        for at in range(first, first + vectors * VECTOR_BYTES, VECTOR_BYTES):
            store(target + at, _of(function, number, load(source + at)))


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    first, end = share_of_vectors(step, part, parts)
    vectors = (end - first) // VECTOR_BYTES
    first_x, first_out, one = x + first, out + first, np.int64(1)
    activate(step.function, step.number, first_x, first_out, np.int64(0), one, vectors)


ACTIVATION = Kernel(_body, takes_pixels, no_scratch)
