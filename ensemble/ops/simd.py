"""One SIMD vector of floats as a numba type, as wide as this CPU's registers, and what it can do.

numba vectorises loops by itself, but not across 36 rows of memory whose overlap it cannot rule out.
Here a vector is a value: `load`, `store`, `+`, `-`, `*`, `maximum`, and `multiply_rows`, the inner
loop of a matrix product, whose sums stay in registers. Addresses are plain integers, in bytes.
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

llvmlite.binding.initialize_native_asmparser()  # for `_assemble`

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
# Does this CPU multiply pairs of bfloat16 and add both products to a float, in one instruction?
HAS_PAIRS = "avx512bf16" in _features()
VECTOR_BYTES = WIDTH * FLOAT_BYTES
PANEL_VECTORS = 2  # columns of a matrix product that are summed together, in vectors
PANEL = PANEL_VECTORS * WIDTH
# Rows summed together: all registers but those for a row of the panel, a factor and a spare.
MAX_ROWS = (REGISTERS - PANEL_VECTORS - 2) // PANEL_VECTORS

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_FUSE = ("contract",)  # a * b + c may be rounded once


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


@intrinsic
def load(typing_context, address):
    """The vector at an address."""

    def generate(context, builder, signature, arguments):
        return _load(builder, _pointer(builder, arguments[0]))

    return vector(types.int64), generate


@intrinsic
def store(typing_context, address, value):
    """Write a vector to an address."""

    def generate(context, builder, signature, arguments):
        _store(builder, arguments[1], _pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def load_float(typing_context, address):
    """The one float at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0]))

    return types.float32(types.int64), generate


@intrinsic
def store_float(typing_context, address, value):
    """Write one float to an address."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def pair(typing_context, low, high):
    """Two vectors of floats, rounded to bfloat16, as one of pairs: elements 0 and 1, 2 and 3, ...

    The pairs are 32 bits each and travel as a vector of floats that is never computed with.
    """

    def generate(context, builder, signature, arguments):
        code = "vcvtne2ps2bf16 $1, $2, $0"  # the names of registers stand in AT&T's order
        return _assemble(builder, code, "=v,v,v", arguments)

    return vector(vector, vector), generate


@intrinsic
def splat(typing_context, value):
    """A vector of one float, repeated."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return vector(types.float32), generate


def _binary(operation: str) -> Any:
    @intrinsic
    def apply(typing_context, left, right):
        def generate(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments, flags=_FUSE)

        return vector(vector, vector), generate

    return apply


_add, _subtract, _multiply = _binary("fadd"), _binary("fsub"), _binary("fmul")


@intrinsic
def maximum(typing_context, left, right):
    """The larger of each two floats; a NaN on the left stays."""

    def generate(context, builder, signature, arguments):
        return _maximum(builder, *arguments)

    return vector(vector, vector), generate


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
    return None


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the integer at an address as one step for all threads; what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_shared(typing_context, address):
    """The integer at an address, as other threads last wrote it."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _INT.as_pointer())
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


def _call(builder: ir.IRBuilder, name: str, result: ir.Type) -> None:
    function_type = ir.FunctionType(result, [])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])


def _assemble(
    builder: ir.IRBuilder, code: str, constraint: str, arguments: Sequence[ir.Value]
) -> ir.Value:
    """One instruction by its name: LLVM's own names for these change from version to version."""
    function_type = ir.FunctionType(_VECTOR, [_VECTOR] * len(arguments))
    return builder.call(ir.InlineAsm(function_type, code, constraint), arguments)


def multiply_rows(rows: int, *, pairs: bool = False) -> Any:
    """The inner loop of a matrix product for `rows` rows and one panel of columns.

    The intrinsic `(a, b, c, c_stride, depth, start, other, flags, ahead)`: c, `rows` rows of a
    panel, `c_stride` bytes apart, is `start + a @ b`, then plus `other`, laid out as c, then relu.
    a is `(depth / WIDTH, rows, WIDTH)`, its last block whole also where depth is not; b is
    `(depth, PANEL)`. `start` is one panel, the same for all rows (the bias). `flags` is a sum of
    `START_FROM_C`, `ADD_OTHER` and `RELU`. What lies `ahead` bytes after b is fetched meanwhile:
    the weights of N models come from memory at every call. With `pairs` each element of a and b is
    a pair of bfloat16, of which both products are added to the sum, a float.
    """

    @intrinsic
    def multiply(typing_context, a, b, c, c_stride, depth, start, other, flags, ahead):
        def generate(context, builder, signature, arguments):
            _multiply_rows(builder, rows, pairs, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


START_FROM_C, ADD_OTHER, RELU = 1, 2, 4


class _Block:
    """The code of one product: sums of `rows` rows of a panel, held in registers."""

    def __init__(self, builder: ir.IRBuilder, rows: int, c_stride: ir.Value) -> None:
        self.builder, self.rows, self.c_stride = builder, rows, c_stride
        cells = [(row, column) for row in range(rows) for column in range(PANEL_VECTORS)]
        self.sums = {cell: cgutils.alloca_once(builder, _VECTOR) for cell in cells}

    def at(self, base: ir.Value, row: int, column: int) -> ir.Value:
        """Where the vector of a row and column lies in what is laid out as c."""
        offset = self.builder.mul(self.c_stride, _constant(row))
        offset = self.builder.add(offset, _constant(column * VECTOR_BYTES))
        return _pointer(self.builder, self.builder.add(base, offset))

    def start(self, from_c: ir.Value, c: ir.Value, start: ir.Value) -> None:
        """Sums begin as c, or as one panel for all rows."""
        builder = self.builder
        with builder.if_else(from_c) as (then, otherwise):
            with then:
                for cell, total in self.sums.items():
                    builder.store(_load(builder, self.at(c, *cell)), total)
            with otherwise:
                for (_, column), total in self.sums.items():
                    address = builder.add(start, _constant(column * VECTOR_BYTES))
                    builder.store(_load(builder, _pointer(builder, address)), total)

    def multiply(self, a: ir.Value, panel: ir.Value, index: ir.Value, pairs: bool) -> None:
        """Add the products of one factor of each row and one row of the panel."""
        builder = self.builder
        block = builder.udiv(index, _constant(WIDTH))
        within = builder.urem(index, _constant(WIDTH))
        position = builder.add(builder.mul(block, _constant(self.rows * WIDTH)), within)
        factors = builder.gep(_pointer(builder, a), [position])
        columns = [
            _load(builder, builder.gep(panel, [_constant(column * WIDTH)]))
            for column in range(PANEL_VECTORS)
        ]
        for row in range(self.rows):
            factor = builder.load(builder.gep(factors, [_constant(row * WIDTH)]))
            repeated = _splat(builder, factor)
            for column, values in enumerate(columns):
                total = self.sums[row, column]
                added = _multiply_add(builder, pairs, repeated, values, builder.load(total))
                builder.store(added, total)

    def add(self, other: ir.Value) -> None:
        """Add what is laid out as c."""
        for cell, total in self.sums.items():
            values = _load(self.builder, self.at(other, *cell))
            self.builder.store(self.builder.fadd(self.builder.load(total), values), total)

    def relu(self) -> None:
        """No sum below 0; a NaN stays."""
        zero = ir.Constant(_VECTOR, [ir.Constant(_FLOAT, 0.0)] * WIDTH)
        for total in self.sums.values():
            self.builder.store(_maximum(self.builder, self.builder.load(total), zero), total)

    def finish(self, c: ir.Value) -> None:
        """Write the sums."""
        for cell, total in self.sums.items():
            _store(self.builder, self.builder.load(total), self.at(c, *cell))


def _multiply_rows(
    builder: ir.IRBuilder, rows: int, pairs: bool, arguments: Sequence[ir.Value]
) -> None:
    a, b, c, c_stride, depth, start, other, flags, ahead = arguments

    def asked(flag: int) -> ir.Value:
        return builder.trunc(builder.lshr(flags, _constant(flag.bit_length() - 1)), _BIT)

    block = _Block(builder, rows, c_stride)
    block.start(asked(START_FROM_C), c, start)
    with cgutils.for_range(builder, depth, intp=_INT) as loop:
        row = builder.mul(loop.index, _constant(PANEL))
        panel = builder.gep(_pointer(builder, b), [row])
        _prefetch(builder, panel, ahead)
        block.multiply(a, panel, loop.index, pairs)
    with builder.if_then(asked(ADD_OTHER)):
        block.add(other)
    with builder.if_then(asked(RELU)):
        block.relu()
    block.finish(c)


def _prefetch(builder: ir.IRBuilder, panel: ir.Value, ahead: ir.Value) -> None:
    """Fetch the row of a panel that lies `ahead` bytes on into the second level of the cache."""
    arguments = [_BYTE.as_pointer(), *[ir.IntType(32)] * 3]
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), arguments), "llvm.prefetch.p0"
    )
    for column in range(0, PANEL * FLOAT_BYTES, LINE_BYTES):
        following = builder.bitcast(panel, _BYTE.as_pointer())
        following = builder.gep(following, [builder.add(ahead, _constant(column))])
        builder.call(prefetch, [following, _hint(0), _hint(2), _hint(1)])


def _multiply_add(
    builder: ir.IRBuilder, pairs: bool, factor: ir.Value, values: ir.Value, total: ir.Value
) -> ir.Value:
    if pairs:
        code = "vdpbf16ps $3, $2, $0"
        return _assemble(builder, code, "=v,0,v,v", (total, factor, values))
    return builder.fadd(builder.fmul(factor, values, flags=_FUSE), total, flags=_FUSE)


_BIT, _BYTE = ir.IntType(1), ir.IntType(8)


def _hint(value: int) -> ir.Constant:
    """Of a prefetch: 0, to be read; 2, into the second level; 1, data."""
    return ir.Constant(ir.IntType(32), value)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _FLOAT.as_pointer())


def _load(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=FLOAT_BYTES)


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer()), align=FLOAT_BYTES)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, undefined, everywhere)


def _maximum(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", left, right), right, left)
