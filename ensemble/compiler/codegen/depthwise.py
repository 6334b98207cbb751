"""Depthwise and grouped microkernels, generated as LLVM IR: a register tile of pixels."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ensemble.compiler.codegen.gemm import (
    ADD_OTHER,
    RELU,
    START_FROM_C,
    RegisterTile,
    has_flag,
)
from ensemble.compiler.codegen.simd import (
    CONTRACT,
    FLOAT_BYTES,
    INT,
    VECTOR,
    VECTOR_BYTES,
    WIDTH,
    broadcast,
    constant,
    load_at,
    pointer_to,
)

_CHANNELS_AT_ONCE = 4  # with weights in registers


def multiply_taps(pixels: int, lanes: int, run: int = 1) -> Any:
    """The microkernel for `pixels` pixels of a row and one vector of output channels.

    The intrinsic `(x, offsets, taps, weights, c, c_stride, start, other, flags)`. At tap t a pixel
    reads the input vector at x plus the t-th of `offsets`, integers; pixels are one vector apart
    there, and `c_stride` bytes in c and other. `start` is one vector, the bias; flags as in
    `multiply_rows`. `weights` has a vector for each input channel of each tap. With `lanes`, groups
    of so many inputs and as many outputs share a vector, and an output reads its own group; taps
    may come in runs of `run` consecutive pixels, which share each shuffle of an input to its lanes.
    With 0 each output reads all inputs, tap by tap.
    """

    @intrinsic
    def multiply(typing_context, x, offsets, taps, weights, c, c_stride, start, other, flags):
        def generate(context, builder, signature, arguments):
            _multiply_taps(builder, pixels, lanes, run, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


def _multiply_taps(
    builder: ir.IRBuilder, pixels: int, lanes: int, run: int, arguments: Sequence[ir.Value]
) -> None:
    x, offsets, taps, weights, c, c_stride, start, other, flags = arguments
    tile = RegisterTile(builder, pixels, c_stride, columns=1)
    tile.start(has_flag(builder, flags, START_FROM_C), c, start)
    table = builder.inttoptr(offsets, INT.as_pointer())
    channels = lanes or WIDTH
    with cgutils.for_range(builder, builder.sdiv(taps, constant(run)), intp=INT) as loop:
        tap = builder.mul(loop.index, constant(run))
        inputs = builder.add(x, builder.load(builder.gep(table, [tap])))
        factors = builder.add(weights, builder.mul(tap, constant(channels * VECTOR_BYTES)))
        if lanes:
            for channel in range(channels):
                _add_run(builder, tile, channel, lanes, run, inputs, factors)
        else:  # one copy of the code for all chunks
            with cgutils.for_range(builder, constant(WIDTH // _CHANNELS_AT_ONCE), intp=INT) as part:
                first = builder.mul(part.index, constant(_CHANNELS_AT_ONCE))
                at = builder.add(inputs, builder.mul(first, constant(FLOAT_BYTES)))
                vectors = builder.add(factors, builder.mul(first, constant(VECTOR_BYTES)))
                _add_channels(builder, tile, at, vectors)
    with builder.if_then(has_flag(builder, flags, ADD_OTHER)):
        tile.add(other)
    with builder.if_then(has_flag(builder, flags, RELU)):
        tile.relu()
    tile.finish(c)


def _add_channels(
    builder: ir.IRBuilder, tile: RegisterTile, inputs: ir.Value, factors: ir.Value
) -> None:
    """Multiply-add some input channels of a tap, which all outputs read."""
    channels = range(_CHANNELS_AT_ONCE)
    weights = [_vector_at(builder, factors, channel) for channel in channels]
    for (pixel, _), total in tile.sums.items():
        at = pointer_to(builder, builder.add(inputs, constant(pixel * VECTOR_BYTES)))
        for channel, weight in zip(channels, weights, strict=True):
            factor = broadcast(builder, builder.load(builder.gep(at, [constant(channel)])))
            _add_product(builder, total, factor, weight)


def _add_run(
    builder: ir.IRBuilder,
    tile: RegisterTile,
    channel: int,
    lanes: int,
    run: int,
    inputs: ir.Value,
    factors: ir.Value,
) -> None:
    """Multiply-add one channel of each group at `run` taps of consecutive pixels: each output reads
    its own group."""
    order = [lane // lanes * lanes + channel for lane in range(WIDTH)]
    indices = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), order)
    weights = [_vector_at(builder, factors, tap * lanes + channel) for tap in range(run)]
    pixels = len(tile.sums)
    for place in range(pixels + run - 1):
        values = _vector_at(builder, inputs, place)
        factor = builder.shuffle_vector(values, ir.Constant(VECTOR, ir.Undefined), indices)
        for tap, weight in enumerate(weights):
            if 0 <= place - tap < pixels:
                _add_product(builder, tile.sums[place - tap, 0], factor, weight)


def _vector_at(builder: ir.IRBuilder, first: ir.Value, index: int) -> ir.Value:
    """The vector with this index, of contiguous ones from the address `first` on."""
    at = builder.add(first, constant(index * VECTOR_BYTES))
    return load_at(builder, pointer_to(builder, at))


def _add_product(
    builder: ir.IRBuilder, total: ir.Value, factor: ir.Value, weight: ir.Value
) -> None:
    product = builder.fmul(factor, weight, flags=CONTRACT)
    builder.store(builder.fadd(product, builder.load(total), flags=CONTRACT), total)
