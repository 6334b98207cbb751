"""The inner loop of a grouped convolution, as LLVM's code."""

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
    Block,
    asked_flag,
)
from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    FUSE,
    INT,
    VECTOR,
    VECTOR_BYTES,
    WIDTH,
    constant,
    load_at,
    pointer_to,
    repeated,
)

_CHANNELS_AT_ONCE = 4  # whose weights are in registers


def multiply_taps(pixels: int, lanes: int, run: int = 1) -> Any:
    """The sums of `pixels` pixels of a row, for one vector of output channels.

    The intrinsic `(x, offsets, taps, weights, c, c_stride, start, other, flags)`. At the tap t a
    pixel reads the vector of inputs at x plus the t-th of `offsets`, integers; pixels lie one
    vector apart there, and `c_stride` bytes in c and other, a vector each. `start` is one vector,
    the bias, flags as in `multiply_rows`. `weights` are vectors: one for each input channel of each
    tap. With `lanes`, groups of so many inputs and as many outputs lie side by side in a vector,
    and an output reads its own group, and taps may come in runs of `run` that read one pixel after
    another: an input is moved to its lanes once for all of them. With 0 each output reads all
    inputs, tap by tap.
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
    block = Block(builder, pixels, c_stride, columns=1)
    block.start(asked_flag(builder, flags, START_FROM_C), c, start)
    table = builder.inttoptr(offsets, INT.as_pointer())
    channels = lanes or WIDTH
    with cgutils.for_range(builder, builder.sdiv(taps, constant(run)), intp=INT) as loop:
        tap = builder.mul(loop.index, constant(run))
        inputs = builder.add(x, builder.load(builder.gep(table, [tap])))
        factors = builder.add(weights, builder.mul(tap, constant(channels * VECTOR_BYTES)))
        if lanes:
            for channel in range(channels):
                _add_run(builder, block, channel, lanes, run, inputs, factors)
        else:  # every chunk by the same code
            with cgutils.for_range(builder, constant(WIDTH // _CHANNELS_AT_ONCE), intp=INT) as part:
                first = builder.mul(part.index, constant(_CHANNELS_AT_ONCE))
                at = builder.add(inputs, builder.mul(first, constant(FLOAT_BYTES)))
                vectors = builder.add(factors, builder.mul(first, constant(VECTOR_BYTES)))
                _add_channels(builder, block, at, vectors)
    with builder.if_then(asked_flag(builder, flags, ADD_OTHER)):
        block.add(other)
    with builder.if_then(asked_flag(builder, flags, RELU)):
        block.relu()
    block.finish(c)


def _add_channels(builder: ir.IRBuilder, block: Block, inputs: ir.Value, factors: ir.Value) -> None:
    """Add the products of some input channels of a tap, read by all outputs, to all sums."""
    channels = range(_CHANNELS_AT_ONCE)
    weights = [_vector_at(builder, factors, channel) for channel in channels]
    for (pixel, _), total in block.sums.items():
        at = pointer_to(builder, builder.add(inputs, constant(pixel * VECTOR_BYTES)))
        for channel, weight in zip(channels, weights, strict=True):
            factor = repeated(builder, builder.load(builder.gep(at, [constant(channel)])))
            _add_product(builder, total, factor, weight)


def _add_run(
    builder: ir.IRBuilder,
    block: Block,
    channel: int,
    lanes: int,
    run: int,
    inputs: ir.Value,
    factors: ir.Value,
) -> None:
    """Add the products of a channel of each group, at `run` taps that read neighbours, to all sums:
    each output multiplies its own group's input."""
    order = [lane // lanes * lanes + channel for lane in range(WIDTH)]
    indices = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), order)
    weights = [_vector_at(builder, factors, tap * lanes + channel) for tap in range(run)]
    pixels = len(block.sums)
    for place in range(pixels + run - 1):
        values = _vector_at(builder, inputs, place)
        factor = builder.shuffle_vector(values, ir.Constant(VECTOR, ir.Undefined), indices)
        for tap, weight in enumerate(weights):
            if 0 <= place - tap < pixels:
                _add_product(builder, block.sums[place - tap, 0], factor, weight)


def _vector_at(builder: ir.IRBuilder, first: ir.Value, index: int) -> ir.Value:
    """A vector of those that lie one after another from the address `first` on."""
    at = builder.add(first, constant(index * VECTOR_BYTES))
    return load_at(builder, pointer_to(builder, at))


def _add_product(
    builder: ir.IRBuilder, total: ir.Value, factor: ir.Value, weight: ir.Value
) -> None:
    product = builder.fmul(factor, weight, flags=FUSE)
    builder.store(builder.fadd(product, builder.load(total), flags=FUSE), total)
