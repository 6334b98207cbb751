"""The inner loops of matrix products, as LLVM's code: sums stay in registers till they are done."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ensemble.compiler.codegen.simd import (
    FLOAT,
    FUSE,
    INT,
    LINE_BYTES,
    PANEL,
    PANEL_VECTORS,
    VECTOR,
    VECTOR_BYTES,
    WIDTH,
    assemble,
    bounded,
    constant,
    fetch_at,
    larger,
    load_at,
    pointer_to,
    repeated,
    store_at,
)

START_FROM_C, ADD_OTHER, RELU, SUBTRACT = 1, 2, 4, 8


def multiply_rows(rows: int, columns: int = PANEL_VECTORS, *, bf16: bool = False) -> Any:
    """The inner loop of a matrix product for `rows` rows and one panel, of which only the first
    `columns` vectors are computed.

    The intrinsic `(a, b, c, c_stride, depth, start, other, flags, ahead)`: c, `rows` rows of so
    many vectors, `c_stride` bytes apart, is `start + a @ b`, then plus `other`, laid out as c, then
    relu.
    a is `(depth / WIDTH, rows, WIDTH)`, its last block whole also where depth is not; b is
    `(depth, PANEL)`. `start` is one panel, the same for all rows (the bias). `flags` is a sum of
    `START_FROM_C`, `ADD_OTHER` and `RELU`. What lies `ahead` bytes after b is fetched meanwhile:
    the weights of N models come from memory at every call. With `bf16` each element of a and b is
    two bfloat16, of which both products are added to the sum, a float.
    """

    @intrinsic
    def multiply(typing_context, a, b, c, c_stride, depth, start, other, flags, ahead):
        def generate(context, builder, signature, arguments):
            _multiply_rows(builder, rows, columns, bf16, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


def multiply_into_two(rows: int) -> Any:
    """`multiply_rows` in floats, its product added to two places.

    The intrinsic `(a, b, depth, ahead, *place, *place)`, where a place is `(base, base_stride, c,
    c_stride, other, flags)`: c, `rows` rows of a panel, becomes `base + a @ b`, with `SUBTRACT`
    `base - a @ b`, then plus `other`, laid out as c, then with `RELU` relu. Rows of base are
    `base_stride` bytes apart: 0 where all are one. Without `other` (0) nothing is added; a second
    place whose c is 0 is none.
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


class Block:
    """The code of one product: sums of `rows` rows of a panel, held in registers."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, c_stride: ir.Value, columns: int = PANEL_VECTORS
    ) -> None:
        self.builder, self.rows, self.c_stride = builder, rows, c_stride
        self.columns = columns
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        self.sums = {cell: cgutils.alloca_once(builder, VECTOR) for cell in cells}

    def at(self, base: ir.Value, row: int, column: int) -> ir.Value:
        """Where the vector of a row and column lies in what is laid out as c."""
        return _Rows(self.builder, self.c_stride).at(base, row, column)

    def start(self, from_c: ir.Value, c: ir.Value, start: ir.Value) -> None:
        """Sums begin as c, or as one panel for all rows."""
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
        """Add the products of one factor of each row and one row of the panel."""
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
            everywhere = repeated(builder, factor)
            for column, values in enumerate(columns):
                total = self.sums[row, column]
                added = _multiply_add(builder, bf16, everywhere, values, builder.load(total))
                builder.store(added, total)

    def add(self, other: ir.Value) -> None:
        """Add what is laid out as c."""
        for cell, total in self.sums.items():
            values = load_at(self.builder, self.at(other, *cell))
            self.builder.store(self.builder.fadd(self.builder.load(total), values), total)

    def relu(self) -> None:
        """No sum below 0; what is not below `LARGE` becomes NaN."""
        zero = _everywhere(0.0)
        for total in self.sums.values():
            value = bounded(self.builder, self.builder.load(total))
            self.builder.store(larger(self.builder, value, zero), total)

    def add_to(self, place: Sequence[ir.Value]) -> None:
        """Write the sums to a place of `multiply_into_two`, added to what that says."""
        builder = self.builder
        base, base_stride, c, c_stride, other, flags = place
        subtract, relu = (asked_flag(builder, flags, flag) for flag in (SUBTRACT, RELU))
        sign = builder.select(subtract, _everywhere(-1.0), _everywhere(1.0))
        least = builder.select(relu, _everywhere(0.0), _everywhere(float("-inf")))
        before, after = (_Rows(builder, stride) for stride in (base_stride, c_stride))
        adds = builder.icmp_signed("!=", other, constant(0))
        zeros = cgutils.alloca_once(builder, ir.ArrayType(VECTOR, PANEL_VECTORS))
        builder.store(ir.Constant(ir.ArrayType(VECTOR, PANEL_VECTORS), None), zeros)
        other = builder.select(adds, other, builder.ptrtoint(zeros, INT))
        added = _Rows(builder, builder.select(adds, c_stride, constant(0)))
        for cell, total in self.sums.items():
            signed = builder.fmul(sign, builder.load(total), flags=FUSE)
            value = builder.fadd(signed, load_at(builder, before.at(base, *cell)), flags=FUSE)
            value = builder.fadd(value, load_at(builder, added.at(other, *cell)))
            value = bounded(builder, value)
            store_at(builder, larger(builder, value, least), after.at(c, *cell))

    def finish(self, c: ir.Value) -> None:
        """Write the sums."""
        for cell, total in self.sums.items():
            store_at(self.builder, self.builder.load(total), self.at(c, *cell))


def _multiply_rows(
    builder: ir.IRBuilder, rows: int, columns: int, bf16: bool, arguments: Sequence[ir.Value]
) -> None:
    a, b, c, c_stride, depth, start, other, flags, ahead = arguments

    def asked(flag: int) -> ir.Value:
        return asked_flag(builder, flags, flag)

    block = Block(builder, rows, c_stride, columns)
    block.start(asked(START_FROM_C), c, start)
    with builder.if_then(asked(ADD_OTHER)):
        _fetch_rows(builder, rows, columns, other, c_stride)
    with cgutils.for_range(builder, depth, intp=INT) as loop:
        row = builder.mul(loop.index, constant(PANEL))
        panel = builder.gep(pointer_to(builder, b), [row])
        _prefetch(builder, panel, columns, ahead)
        block.multiply(a, panel, loop.index, bf16)
    with builder.if_then(asked(ADD_OTHER)):
        block.add(other)
    with builder.if_then(asked(RELU)):
        block.relu()
    block.finish(c)


def _multiply_into_two(builder: ir.IRBuilder, rows: int, arguments: Sequence[ir.Value]) -> None:
    a, b, depth, ahead, *places = arguments
    first, second = places[:6], places[6:]
    block = Block(builder, rows, constant(0))
    for total in block.sums.values():
        builder.store(_everywhere(0.0), total)
    for place in (first, second):
        with builder.if_then(builder.icmp_signed("!=", place[4], constant(0))):
            _fetch_rows(builder, rows, PANEL_VECTORS, place[4], place[3])
    with cgutils.for_range(builder, depth, intp=INT) as loop:
        row = builder.mul(loop.index, constant(PANEL))
        panel = builder.gep(pointer_to(builder, b), [row])
        _prefetch(builder, panel, PANEL_VECTORS, ahead)
        block.multiply(a, panel, loop.index, False)
    has_second = builder.icmp_signed("!=", second[2], constant(0))
    count = builder.select(has_second, constant(2), constant(1))
    with cgutils.for_range(builder, count, intp=INT) as loop:  # the code stands once for both
        is_first = builder.icmp_signed("==", loop.index, constant(0))
        choices = zip(first, second, strict=True)
        block.add_to([builder.select(is_first, *either) for either in choices])


def _prefetch(builder: ir.IRBuilder, panel: ir.Value, columns: int, ahead: ir.Value) -> None:
    """Fetch the row of a panel that lies `ahead` bytes on into the second level of the cache."""
    for column in range(0, columns * VECTOR_BYTES, LINE_BYTES):
        following = builder.add(builder.ptrtoint(panel, INT), ahead)
        fetch_at(builder, builder.add(following, constant(column)))


def _fetch_rows(
    builder: ir.IRBuilder, rows: int, columns: int, start: ir.Value, stride: ir.Value
) -> None:
    """Fetch what a product adds at its end, rows of a panel, while it multiplies."""
    with cgutils.for_range(builder, constant(rows), intp=INT) as loop:
        first = builder.add(start, builder.mul(stride, loop.index))
        for column in range(0, columns * VECTOR_BYTES, LINE_BYTES):
            address = builder.add(first, constant(column))
            fetch_at(builder, address)


def _multiply_add(
    builder: ir.IRBuilder, bf16: bool, factor: ir.Value, values: ir.Value, total: ir.Value
) -> ir.Value:
    if bf16:
        code = "vdpbf16ps $3, $2, $0"
        return assemble(builder, code, "=v,0,v,v", (total, factor, values))
    return builder.fadd(builder.fmul(factor, values, flags=FUSE), total, flags=FUSE)


def asked_flag(builder: ir.IRBuilder, flags: ir.Value, flag: int) -> ir.Value:
    """Is the flag in a sum of flags?"""
    return builder.trunc(builder.lshr(flags, constant(flag.bit_length() - 1)), _BIT)


def _everywhere(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [ir.Constant(FLOAT, value)] * WIDTH)


_BIT = ir.IntType(1)
