"""One SIMD vector of floats as a numba type, as wide as this CPU's registers, and what it can do.

numba vectorises loops by itself, but not across 36 rows of memory whose overlap it cannot rule out.
Here a vector is a value: `load`, `store`, `+`, `-`, `*`, `maximum`. Addresses are plain integers,
in bytes. Below stand the pieces of LLVM's code that `products` and `taps` are made of.
"""

import operator
import os
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, overload, register_model

llvmlite.binding.initialize_native_asmparser()  # for `assemble`

FLOAT_BYTES = 4
LINE_BYTES = 64  # of the cache


def _features() -> set[str]:
    """What the code is compiled for: this CPU's features, or those of NUMBA_CPU_FEATURES."""
    asked: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    if asked is None:
        found = llvmlite.binding.get_host_cpu_features()
        return {name for name, there in found.items() if there}
    return {name[1:] for name in asked.split(",") if name.startswith("+")}


def _registers(features: set[str]) -> tuple[int, int]:
    """Floats in a vector register, and how many such registers there are."""
    if "avx512f" in features:
        return 16, 32
    if {"avx2", "fma"} <= features:
        return 8, 16
    return 4, 32 if "neon" in features else 16


WIDTH, REGISTERS = _registers(_features())
# Does this CPU multiply bfloat16 by twos, both products added to a float, in one instruction?
HAS_BF16_DOT = "avx512bf16" in _features()
VECTOR_BYTES = WIDTH * FLOAT_BYTES
PANEL_VECTORS = 2  # columns of a matrix product that are summed together, in vectors
PANEL = PANEL_VECTORS * WIDTH
# Rows summed together: all registers but those for a row of the panel, a factor and a spare.
MAX_ROWS = (REGISTERS - PANEL_VECTORS - 2) // PANEL_VECTORS

# The least magnitude that counts as an overflow: see `Program`. Times SCALE it is one.
LARGE = SCALE = 2.0**64

FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, WIDTH)
FUSE = ("contract",)  # a * b + c may be rounded once


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


@intrinsic
def load(typing_context, address):
    """The vector at an address."""

    def generate(context, builder, signature, arguments):
        return load_at(builder, pointer_to(builder, arguments[0]))

    return vector(types.int64), generate


@intrinsic
def store(typing_context, address, value):
    """Write a vector to an address."""

    def generate(context, builder, signature, arguments):
        store_at(builder, arguments[1], pointer_to(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def load_float(typing_context, address):
    """The one float at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(pointer_to(builder, arguments[0]))

    return types.float32(types.int64), generate


@intrinsic
def store_float(typing_context, address, value):
    """Write one float to an address."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], pointer_to(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def fetch(typing_context, address):
    """Bring what lies at an address into the second level of the cache, while others compute."""

    def generate(context, builder, signature, arguments):
        fetch_at(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def to_bf16(typing_context, low, high):
    """Two vectors of floats, rounded to bfloat16, as one: two numbers in the room of a float.

    It travels as a vector of floats that is never computed with.
    """

    def generate(context, builder, signature, arguments):
        code = "vcvtne2ps2bf16 $1, $2, $0"  # the names of registers stand in AT&T's order
        return assemble(builder, code, "=v,v,v", arguments)

    return vector(vector, vector), generate


@intrinsic
def splat(typing_context, value):
    """A vector of one float, repeated."""

    def generate(context, builder, signature, arguments):
        return repeated(builder, arguments[0])

    return vector(types.float32), generate


def _binary(operation: str) -> Any:
    @intrinsic
    def apply(typing_context, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments, flags=FUSE)

        return vector(vector, vector), generate

    return apply


_add, _subtract, _multiply = _binary("fadd"), _binary("fsub"), _binary("fmul")
_divide = _binary("fdiv")


@intrinsic
def maximum(typing_context, left, right):
    """The larger of each two floats; a NaN on the left stays."""

    def generate(context, builder, signature, arguments):
        return larger(builder, *arguments)

    return vector(vector, vector), generate


@intrinsic
def minimum(typing_context, left, right):
    """The smaller of each two floats; a NaN on the left stays."""

    def generate(context, builder, signature, arguments):
        left, right = arguments
        return builder.select(builder.fcmp_ordered(">", left, right), right, left)

    return vector(vector, vector), generate


@intrinsic
def bounded_or_nan(typing_context, value):
    """Each float below `LARGE`; NaN for one that is larger, infinities too. A NaN stays."""

    def generate(context, builder, signature, arguments):
        return bounded(builder, arguments[0])

    return vector(vector), generate


@intrinsic
def exponential(typing_context, value):
    """exp of each float: infinite above the largest float, 0 below 2^-125.5. A NaN stays.

    exp(x) = 2^n exp(r), n the integer nearest to x / log(2), and r a rest of at most log(2) / 2,
    whose exponential is a polynomial (Cephes' expf, S. Moshier).
    """

    def generate(context, builder, signature, arguments):
        return _exponential(builder, arguments[0])

    return vector(vector), generate


_LOWEST, _HIGHEST = -87.3, 89.0  # n is -126 and 128 there
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_CEPHES = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
_ROUNDING = 1.5 * 2**23  # added to a float, leaves its nearest integer in the lowest bits


def _exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    def all_of(value: float) -> ir.Constant:
        return ir.Constant(VECTOR, [value] * WIDTH)

    def fused(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(a, b, flags=FUSE), c, flags=FUSE)

    low, high = all_of(_LOWEST), all_of(_HIGHEST)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = builder.fadd(builder.fmul(x, all_of(_LOG2_E)), all_of(_ROUNDING))
    n = builder.fsub(shifted, all_of(_ROUNDING))
    rest = fused(n, all_of(-_LN2_HIGH), x)
    rest = fused(n, all_of(-_LN2_LOW), rest)
    total = all_of(_CEPHES[0])
    for factor in _CEPHES[1:]:
        total = fused(total, rest, all_of(factor))
    square = builder.fmul(rest, rest)
    total = builder.fadd(fused(total, square, rest), all_of(1.0))
    integers = ir.VectorType(ir.IntType(32), WIDTH)
    bits = builder.bitcast(shifted, integers)
    exponent = builder.shl(bits, ir.Constant(integers, [23] * WIDTH))
    # 2^(n - 1), which is a float for n = 128 too and has the bits of 0 for n = -126; then doubled.
    power = builder.add(exponent, ir.Constant(integers, [0x3F000000] * WIDTH))
    half = builder.fmul(total, builder.bitcast(power, VECTOR))
    return builder.fadd(half, half)


@intrinsic
def maximum_or_nan(typing_context, left, right):
    """The larger of each two floats, or NaN where either is one."""

    def generate(context, builder, signature, arguments):
        left, right = arguments
        is_nan = builder.fcmp_unordered("uno", right, right)
        larger = builder.or_(builder.fcmp_ordered("<", left, right), is_nan)
        return builder.select(larger, right, left)

    return vector(vector, vector), generate


@overload(operator.add)
def _(left, right):
    if isinstance(left, Vector) and isinstance(right, Vector):
        return lambda left, right: _add(left, right)
    return None


@overload(operator.sub)
def _(left, right):
    if isinstance(left, Vector) and isinstance(right, Vector):
        return lambda left, right: _subtract(left, right)
    return None


@overload(operator.mul)
def _(left, right):
    if isinstance(left, types.Number) and isinstance(right, Vector):
        return lambda left, right: _multiply(splat(left), right)  # type: ignore[call-arg]
    if isinstance(left, Vector) and isinstance(right, Vector):
        return lambda left, right: _multiply(left, right)
    return None


@overload(operator.truediv)
def _(left, right):
    if isinstance(left, Vector) and isinstance(right, Vector):
        return lambda left, right: _divide(left, right)
    return None


def _fetch_and(operation: str) -> Any:
    """Change the integer at an address as one step for all threads; gives what it was before."""

    @intrinsic
    def fetch(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], INT.as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], "seq_cst")

        return types.int64(types.int64, types.int64), generate

    return fetch


fetch_add, fetch_or = _fetch_and("add"), _fetch_and("or")


@intrinsic
def load_shared(typing_context, address):
    """The integer at an address, as other threads last wrote it."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], INT.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def relax(typing_context):
    """What a spinning thread does meanwhile: x86 leaves the core to its other hardware thread."""

    def generate(context, builder, signature, arguments):
        if "x86" in llvmlite.binding.get_process_triple():
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing_context):
    """Let another thread have this core, if one waits for it; for POSIX systems."""

    def generate(context, builder, signature, arguments):
        if os.name == "posix":
            _call(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def stand_alone(typing_context):
    """Keep the function that calls this whole: LLVM would copy its code to where it is called."""

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def _call(builder: ir.IRBuilder, name: str, result: ir.Type) -> None:
    function_type = ir.FunctionType(result, [])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])


def assemble(
    builder: ir.IRBuilder, code: str, constraint: str, arguments: Sequence[ir.Value]
) -> ir.Value:
    """One instruction by its name: LLVM's own names for these change from version to version."""
    function_type = ir.FunctionType(VECTOR, [VECTOR] * len(arguments))
    return builder.call(ir.InlineAsm(function_type, code, constraint), arguments)


def constant(value: int) -> ir.Constant:
    return ir.Constant(INT, value)


def pointer_to(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, FLOAT.as_pointer())


def load_at(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=FLOAT_BYTES)


def store_at(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, VECTOR.as_pointer()), align=FLOAT_BYTES)


def fetch_at(builder: ir.IRBuilder, address: ir.Value) -> None:
    """As `fetch`."""
    pointer, hint = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, *[hint] * 3]), "llvm.prefetch.p0"
    )
    read, second_level, data = (ir.Constant(hint, value) for value in (0, 2, 1))
    builder.call(prefetch, [builder.inttoptr(address, pointer), read, second_level, data])


def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, undefined, everywhere)


def larger(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", left, right), right, left)


def bounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """`value + 0 * scaled`, where scaled is infinite from `LARGE` on."""
    zero, scale = (ir.Constant(VECTOR, [number] * WIDTH) for number in (0.0, SCALE))
    scaled = builder.fmul(value, scale)
    return builder.fadd(builder.fmul(scaled, zero, flags=FUSE), value, flags=FUSE)
