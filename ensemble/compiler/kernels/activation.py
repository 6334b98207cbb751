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

NONE, RELU, RELU6, SIGMOID, SILU, HARDSIGMOID, HARDSWISH, LEAKY_RELU = map(int, [*Activation][:8])
TANH, GELU, GELU_TANH = map(int, [*Activation][8:])


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
def _horner(x, factors):
    """The polynomial with these coefficients, of the highest power first."""
    total = splat(np.float32(factors[0]))
    for index in range(1, len(factors)):
        total = total * x + splat(np.float32(factors[index]))
    return total


# tanh as a rational function, of 13th over 6th degree, on [-9, 9], beyond which it is 1 in float32
# (Eigen's `ptanh_float`, B. Steiner). For small x it keeps relative accuracy.
_TANH_ODD = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_EVEN = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)
_TANH_BOUND = 7.99881172180175781  # where the quotient reaches 1


@jit
def _tanh(value):
    bound = np.float32(_TANH_BOUND)
    x = maximum(minimum(value, splat(bound)), splat(-bound))
    square = x * x
    return x * (_horner(square, _TANH_ODD) / _horner(square, _TANH_EVEN))


# 1 - erf(z), z >= 0, as exp(-z^2) times a polynomial of t = 1 / (1 + p z), with an error of 1.5e-7
# (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, as torch does).
_ERF_P = 0.3275911
_ERF_FACTORS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)


@jit
def _gelu(x):
    """x times the normal distribution function: max(x, 0) - abs(x) (1 - erf(abs(x) / sqrt(2))) / 2,
    which cancels nowhere."""
    size = maximum(x, np.float32(-1) * x)
    z = np.float32(0.5**0.5) * size
    one = splat(np.float32(1))
    t = one / (one + np.float32(_ERF_P) * z)
    tail = _horner(t, _ERF_FACTORS) * exponential(np.float32(-1) * (z * z))
    return maximum(x, splat(np.float32(0))) - np.float32(0.5) * (size * tail)


@jit
def _gelu_tanh(x):
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u)."""
    u = x + np.float32(0.044715) * (x * x * x)
    return x * _sigmoid(np.float32(2 * (2 / np.pi) ** 0.5) * u)


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
    if activation == TANH:
        return _tanh(x)
    if activation == GELU:
        return _gelu(x)
    if activation == GELU_TANH:
        return _gelu_tanh(x)
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
