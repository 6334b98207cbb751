"""GEMM microkernels, generated as LLVM IR: a register tile of sums over the whole depth."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ensemble.compiler.codegen.simd import (
    CONTRACT,
    FLOAT,
    INT,
    LINE_BYTES,
    PANEL,
    PANEL_VECTORS,
    VECTOR,
    VECTOR_BYTES,
    WIDTH,
    bounded,
    broadcast,
    constant,
    inline_assembly,
    larger,
    load_at,
    pointer_to,
    prefetch_at,
    store_at,
)

START_FROM_C, ADD_OTHER, RELU, SUBTRACT = 1, 2, 4, 8


def multiply_rows(rows: int, columns: int = PANEL_VECTORS, *, bf16: bool = False) -> Any:
    """The microkernel for `rows` rows and the first `columns` vectors of a panel.

    The intrinsic `(a, b, c, c_stride, depth, start, other, flags, ahead)`: c, `rows` rows of so
    many vectors, `c_stride` bytes apart, is `start + a @ b`, with the epilogue `+ other`, laid out
    as c, and relu.
    a is `(depth / WIDTH, rows, WIDTH)`, its last block padded; b is `(depth, PANEL)`. `start` is
    one panel, shared by all rows (the bias). `flags` is a sum of `START_FROM_C`, `ADD_OTHER` and
    `RELU`. It prefetches `ahead` bytes after b: every call reads the weights of N models from
    memory. With `bf16` each element of a and b is two bfloat16, whose products are accumulated in
    float.
    """

    @intrinsic
    def multiply(typing_context, a, b, c, c_stride, depth, start, other, flags, ahead):
        def generate(context, builder, signature, arguments):
            _multiply_rows(builder, rows, columns, bf16, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


def multiply_into_two(rows: int) -> Any:
    """`multiply_rows` in float32, accumulated into two destinations.

    The intrinsic `(a, b, depth, ahead, *destination, *destination)`, a destination being `(base,
    base_stride, c, c_stride, other, flags)`: c, `rows` rows of a panel, becomes `base + a @ b`, or
    `base - a @ b` with `SUBTRACT`; the epilogue adds `other`, laid out as c, and applies relu with
    `RELU`. Rows of base are `base_stride` bytes apart, 0 for a broadcast row. `other` 0 means none;
    c 0 in the second destination means no second one.
    """

    @intrinsic
    def multiply(
        typing_context, a, b, depth, ahead, b1, s1, c1, t1, o1, f1, b2, s2, c2, t2, o2, f2
    ):
        def generate(context, builder, signature, arguments):
            _multiply_into_two(builder, rows, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 16), generate

    return multiply


class _Rows:
    """Rows of vectors, `stride` bytes from one to the next."""

    def __init__(self, builder: ir.IRBuilder, stride: ir.Value) -> None:
        self.builder, self.stride = builder, stride

    def at(self, base: ir.Value, row: int, column: int) -> ir.Value:
        offset = self.builder.mul(self.stride, constant(row))
        offset = self.builder.add(offset, constant(column * VECTOR_BYTES))
        return pointer_to(self.builder, self.builder.add(base, offset))


class RegisterTile:
    """The code of one microkernel: sums of `rows` rows of a panel, held in registers."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, c_stride: ir.Value, columns: int = PANEL_VECTORS
    ) -> None:
        self.builder, self.rows, self.c_stride = builder, rows, c_stride
        self.columns = columns
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        self.sums = {cell: cgutils.alloca_once(builder, VECTOR) for cell in cells}

    def at(self, base: ir.Value, row: int, column: int) -> ir.Value:
        """The address of the vector of a row and column in memory laid out as c."""
        return _Rows(self.builder, self.c_stride).at(base, row, column)

    def start(self, from_c: ir.Value, c: ir.Value, start: ir.Value) -> None:
        """Initialize the sums from c, or from one panel for all rows."""
        builder = self.builder
        with builder.if_else(from_c) as (then, otherwise):
            with then:
                for cell, total in self.sums.items():
                    builder.store(load_at(builder, self.at(c, *cell)), total)
            with otherwise:
                for (_, column), total in self.sums.items():
                    address = builder.add(start, constant(column * VECTOR_BYTES))
                    builder.store(load_at(builder, pointer_to(builder, address)), total)

    def multiply(self, a: ir.Value, panel: ir.Value, index: ir.Value, bf16: bool) -> None:
        """Multiply-add one element of each row with one row of the panel."""
        builder = self.builder
        block = builder.udiv(index, constant(WIDTH))
        within = builder.urem(index, constant(WIDTH))
        position = builder.add(builder.mul(block, constant(self.rows * WIDTH)), within)
        factors = builder.gep(pointer_to(builder, a), [position])
        columns = [
            load_at(builder, builder.gep(panel, [constant(column * WIDTH)]))
            for column in range(self.columns)
        ]
        for row in range(self.rows):
            factor = builder.load(builder.gep(factors, [constant(row * WIDTH)]))
            everywhere = broadcast(builder, factor)
            for column, values in enumerate(columns):
                total = self.sums[row, column]
                added = _multiply_add(builder, bf16, everywhere, values, builder.load(total))
                builder.store(added, total)

    def add(self, other: ir.Value) -> None:
        """Epilogue: add memory laid out as c."""
        for cell, total in self.sums.items():
            values = load_at(self.builder, self.at(other, *cell))
            self.builder.store(self.builder.fadd(self.builder.load(total), values), total)

    def relu(self) -> None:
        """Epilogue: relu; magnitudes from `LARGE` on become NaN."""
        zero = _all_lanes(0.0)
        for total in self.sums.values():
            value = bounded(self.builder, self.builder.load(total))
            self.builder.store(larger(self.builder, value, zero), total)

    def accumulate(self, destination: Sequence[ir.Value]) -> None:
        """Accumulate the sums into a destination of `multiply_into_two`."""
        builder = self.builder
        base, base_stride, c, c_stride, other, flags = destination
        subtract, relu = (has_flag(builder, flags, flag) for flag in (SUBTRACT, RELU))
        sign = builder.select(subtract, _all_lanes(-1.0), _all_lanes(1.0))
        lower_bound = builder.select(relu, _all_lanes(0.0), _all_lanes(float("-inf")))
        before, after = (_Rows(builder, stride) for stride in (base_stride, c_stride))
        adds = builder.icmp_signed("!=", other, constant(0))
        zeros = cgutils.alloca_once(builder, ir.ArrayType(VECTOR, PANEL_VECTORS))
        builder.store(ir.Constant(ir.ArrayType(VECTOR, PANEL_VECTORS), None), zeros)
        other = builder.select(adds, other, builder.ptrtoint(zeros, INT))
        added = _Rows(builder, builder.select(adds, c_stride, constant(0)))
        for cell, total in self.sums.items():
            signed = builder.fmul(sign, builder.load(total), flags=CONTRACT)
            value = builder.fadd(signed, load_at(builder, before.at(base, *cell)), flags=CONTRACT)
            value = builder.fadd(value, load_at(builder, added.at(other, *cell)))
            value = bounded(builder, value)
            store_at(builder, larger(builder, value, lower_bound), after.at(c, *cell))

    def finish(self, c: ir.Value) -> None:
        """Write the sums."""
        for cell, total in self.sums.items():
            store_at(self.builder, self.builder.load(total), self.at(c, *cell))


def _multiply_rows(
    builder: ir.IRBuilder, rows: int, columns: int, bf16: bool, arguments: Sequence[ir.Value]
) -> None:
    a, b, c, c_stride, depth, start, other, flags, ahead = arguments

    def has(flag: int) -> ir.Value:
        return has_flag(builder, flags, flag)

    tile = RegisterTile(builder, rows, c_stride, columns)
    tile.start(has(START_FROM_C), c, start)
    with builder.if_then(has(ADD_OTHER)):
        _prefetch_rows(builder, rows, columns, other, c_stride)
    with cgutils.for_range(builder, depth, intp=INT) as loop:
        row = builder.mul(loop.index, constant(PANEL))
        panel = builder.gep(pointer_to(builder, b), [row])
        _prefetch(builder, panel, columns, ahead)
        tile.multiply(a, panel, loop.index, bf16)
    with builder.if_then(has(ADD_OTHER)):
        tile.add(other)
    with builder.if_then(has(RELU)):
        tile.relu()
    tile.finish(c)


def _multiply_into_two(builder: ir.IRBuilder, rows: int, arguments: Sequence[ir.Value]) -> None:
    a, b, depth, ahead, *operands = arguments
    first, second = operands[:6], operands[6:]
    tile = RegisterTile(builder, rows, constant(0))
    for total in tile.sums.values():
        builder.store(_all_lanes(0.0), total)
    for destination in (first, second):
        with builder.if_then(builder.icmp_signed("!=", destination[4], constant(0))):
            _prefetch_rows(builder, rows, PANEL_VECTORS, destination[4], destination[3])
    with cgutils.for_range(builder, depth, intp=INT) as loop:
        row = builder.mul(loop.index, constant(PANEL))
        panel = builder.gep(pointer_to(builder, b), [row])
        _prefetch(builder, panel, PANEL_VECTORS, ahead)
        tile.multiply(a, panel, loop.index, False)
    has_second = builder.icmp_signed("!=", second[2], constant(0))
    count = builder.select(has_second, constant(2), constant(1))
    with cgutils.for_range(builder, count, intp=INT) as loop:  # one copy of the code for both
        is_first = builder.icmp_signed("==", loop.index, constant(0))
        choices = zip(first, second, strict=True)
        tile.accumulate([builder.select(is_first, *either) for either in choices])


def _prefetch(builder: ir.IRBuilder, panel: ir.Value, columns: int, ahead: ir.Value) -> None:
    """Prefetch the row of a panel `ahead` bytes on into L2."""
    for column in range(0, columns * VECTOR_BYTES, LINE_BYTES):
        following = builder.add(builder.ptrtoint(panel, INT), ahead)
        prefetch_at(builder, builder.add(following, constant(column)))


def _prefetch_rows(
    builder: ir.IRBuilder, rows: int, columns: int, start: ir.Value, stride: ir.Value
) -> None:
    """Prefetch what the epilogue adds, rows of a panel, while the loop multiplies."""
    with cgutils.for_range(builder, constant(rows), intp=INT) as loop:
        first = builder.add(start, builder.mul(stride, loop.index))
        for column in range(0, columns * VECTOR_BYTES, LINE_BYTES):
            address = builder.add(first, constant(column))
            prefetch_at(builder, address)


def _multiply_add(
    builder: ir.IRBuilder, bf16: bool, factor: ir.Value, values: ir.Value, total: ir.Value
) -> ir.Value:
    if bf16:
        code = "vdpbf16ps $3, $2, $0"
        return inline_assembly(builder, code, "=v,0,v,v", (total, factor, values))
    return builder.fadd(builder.fmul(factor, values, flags=CONTRACT), total, flags=CONTRACT)


def has_flag(builder: ir.IRBuilder, flags: ir.Value, flag: int) -> ir.Value:
    """Is the flag in a sum of flags?"""
    return builder.trunc(builder.lshr(flags, constant(flag.bit_length() - 1)), _BIT)


def _all_lanes(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [ir.Constant(FLOAT, value)] * WIDTH)


_BIT = ir.IntType(1)
