"""A SIMD vector of floats as a numba type, as wide as this CPU's registers, and its intrinsics.

numba vectorizes loops, but not across 36 rows of memory that may alias. Here a vector is a value:
`load`, `store`, `+`, `-`, `*`, `maximum`. Addresses are integers, in bytes. The builders of LLVM IR
at the end are what the microkernels (`gemm`, `depthwise`) consist of.
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

llvmlite.binding.initialize_native_asmparser()  # for `inline_assembly`

FLOAT_BYTES = 4
LINE_BYTES = 64  # a cache line


def _features() -> set[str]:
    """The target's features: those of this CPU, or NUMBA_CPU_FEATURES."""
    requested: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    if requested is None:
        found = llvmlite.binding.get_host_cpu_features()
        return {name for name, there in found.items() if there}
    return {name[1:] for name in requested.split(",") if name.startswith("+")}


def _registers(features: set[str]) -> tuple[int, int]:
    """Floats per vector register, and the number of registers."""
    if "avx512f" in features:
        return 16, 32
    if {"avx2", "fma"} <= features:
        return 8, 16
    return 4, 32 if "neon" in features else 16


WIDTH, REGISTERS = _registers(_features())
# Has this CPU a dot product of pairs of bfloat16, accumulated in float?
HAS_BF16_DOT = "avx512bf16" in _features()
VECTOR_BYTES = WIDTH * FLOAT_BYTES
PANEL_VECTORS = 2  # columns of a register tile, in vectors
PANEL = PANEL_VECTORS * WIDTH
# Rows of a register tile: all registers but those for a row of the panel, a broadcast and a spare.
MAX_ROWS = (REGISTERS - PANEL_VECTORS - 2) // PANEL_VECTORS

# The least magnitude that counts as an overflow: see `Program`. Times SCALE it overflows.
LARGE = SCALE = 2.0**64

FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, WIDTH)
CONTRACT = ("contract",)  # a * b + c may be rounded once


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
    """The float at an address."""

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
def prefetch(typing_context, address):
    """Prefetch the cache line at an address into L2."""

    def generate(context, builder, signature, arguments):
        prefetch_at(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def to_bf16(typing_context, low, high):
    """Two vectors of floats, rounded to bfloat16, in one: two numbers in the bits of a float.

    Its type is a vector of floats, which no arithmetic may use.
    """

    def generate(context, builder, signature, arguments):
        code = "vcvtne2ps2bf16 $1, $2, $0"  # operands in AT&T order
        return inline_assembly(builder, code, "=v,v,v", arguments)

    return vector(vector, vector), generate


@intrinsic
def splat(typing_context, value):
    """A float, broadcast to a vector."""

    def generate(context, builder, signature, arguments):
        return broadcast(builder, arguments[0])

    return vector(types.float32), generate


def _binary(operation: str) -> Any:
    @intrinsic
    def apply(typing_context, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments, flags=CONTRACT)

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
        return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)

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


@intrinsic
def lane_sum(typing_context, value):
    """The sum of a vector's floats, in pairs."""

    def generate(context, builder, signature, arguments):
        (total,) = arguments
        undefined, distance = ir.Constant(VECTOR, ir.Undefined), WIDTH // 2
        while distance:
            lanes = [(lane + distance) % WIDTH for lane in range(WIDTH)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), lanes)
            total = builder.fadd(total, builder.shuffle_vector(total, undefined, mask))
            distance //= 2
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), generate


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
    """An atomic read-modify-write of the integer at an address; returns the old value."""

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
    """An atomic load (acquire) of the integer at an address."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], INT.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def relax(typing_context):
    """The pause of a spin loop: on x86 the other hardware thread of the core runs faster."""

    def generate(context, builder, signature, arguments):
        if "x86" in llvmlite.binding.get_process_triple():
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typing_context):
    """Yield this core to another runnable thread, on POSIX systems."""

    def generate(context, builder, signature, arguments):
        if os.name == "posix":
            _call(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def no_inline(typing_context):
    """Forbid inlining of the calling function: its code is large."""

    def generate(context, builder, signature, arguments):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def _call(builder: ir.IRBuilder, name: str, result: ir.Type) -> None:
    function_type = ir.FunctionType(result, [])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])


def inline_assembly(
    builder: ir.IRBuilder, code: str, constraint: str, arguments: Sequence[ir.Value]
) -> ir.Value:
    """One instruction by its mnemonic: LLVM's intrinsics change from version to version."""
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


def prefetch_at(builder: ir.IRBuilder, address: ir.Value) -> None:
    """As the intrinsic `prefetch`."""
    pointer, hint = ir.IntType(8).as_pointer(), ir.IntType(32)
    llvm_prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, *[hint] * 3]), "llvm.prefetch.p0"
    )
    read, second_level, data = (ir.Constant(hint, value) for value in (0, 2, 1))
    builder.call(llvm_prefetch, [builder.inttoptr(address, pointer), read, second_level, data])


def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
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
    return builder.fadd(builder.fmul(scaled, zero, flags=CONTRACT), value, flags=CONTRACT)
