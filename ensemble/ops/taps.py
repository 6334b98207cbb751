"""The inner loop of a grouped convolution, as LLVM's code."""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ensemble.ops.products import ADD_OTHER, RELU, START_FROM_C, Block, asked_flag
from ensemble.ops.simd import (
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
    and an output reads its own group; with 0 each output reads all inputs. Where taps come in runs
    that read neighbours, each its pixel's next, an input is moved to its lanes once for a `run`.
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
    runs = taps if run == 1 else builder.sdiv(taps, constant(run))
    with cgutils.for_range(builder, runs, intp=INT) as loop:
        tap = builder.mul(loop.index, constant(run))
        inputs = builder.add(x, builder.load(builder.gep(table, [tap])))
        factors = builder.add(weights, builder.mul(tap, constant(channels * VECTOR_BYTES)))
        if run > 1:
            for channel in range(channels):
                _add_run(builder, block, channel, lanes, run, inputs, factors)
        elif lanes:
            for first in range(0, channels, _CHANNELS_AT_ONCE):
                chunk = range(first, min(first + _CHANNELS_AT_ONCE, channels))
                _add_channels(builder, block, chunk, lanes, inputs, factors)
        else:  # every chunk by the same code
            with cgutils.for_range(builder, constant(WIDTH // _CHANNELS_AT_ONCE), intp=INT) as part:
                first = builder.mul(part.index, constant(_CHANNELS_AT_ONCE))
                at = builder.add(inputs, builder.mul(first, constant(FLOAT_BYTES)))
                vectors = builder.add(factors, builder.mul(first, constant(VECTOR_BYTES)))
                _add_channels(builder, block, range(_CHANNELS_AT_ONCE), lanes, at, vectors)
    with builder.if_then(asked_flag(builder, flags, ADD_OTHER)):
        block.add(other)
    with builder.if_then(asked_flag(builder, flags, RELU)):
        block.relu()
    block.finish(c)


def _add_channels(
    builder: ir.IRBuilder,
    block: Block,
    channels: range,
    lanes: int,
    inputs: ir.Value,
    factors: ir.Value,
) -> None:
    """Add the products of some input channels of a tap to the sums of all pixels."""
    weights = [
        load_at(
            builder, pointer_to(builder, builder.add(factors, constant(channel * VECTOR_BYTES)))
        )
        for channel in channels
    ]
    for (pixel, _), total in block.sums.items():
        at = pointer_to(builder, builder.add(inputs, constant(pixel * VECTOR_BYTES)))
        value = builder.load(total)
        for weight, factor in zip(weights, _factors(builder, at, channels, lanes), strict=True):
            product = builder.fmul(factor, weight, flags=FUSE)
            value = builder.fadd(product, value, flags=FUSE)
        builder.store(value, total)


def _add_run(
    builder: ir.IRBuilder,
    block: Block,
    channel: int,
    lanes: int,
    run: int,
    inputs: ir.Value,
    factors: ir.Value,
) -> None:
    """Add the products of an input channel of `run` taps, which read neighbours, to all sums."""
    weights = [
        load_at(builder, pointer_to(builder, builder.add(factors, constant(offset * VECTOR_BYTES))))
        for offset in range(channel, run * lanes, lanes)
    ]
    totals = [total for _, total in sorted(block.sums.items(), key=lambda item: item[0])]
    for place in range(len(totals) + run - 1):
        at = pointer_to(builder, builder.add(inputs, constant(place * VECTOR_BYTES)))
        (factor,) = _factors(builder, at, range(channel, channel + 1), lanes)
        for tap, weight in enumerate(weights):
            if 0 <= place - tap < len(totals):
                total = totals[place - tap]
                product = builder.fmul(factor, weight, flags=FUSE)
                sum_ = builder.fadd(product, builder.load(total), flags=FUSE)
                builder.store(sum_, total)


def _factors(
    builder: ir.IRBuilder, at: ir.Value, channels: range, lanes: int
) -> Iterator[ir.Value]:
    """For each channel, what each output of a vector multiplies: its own group's input."""
    if not lanes:
        for channel in channels:
            yield repeated(builder, builder.load(builder.gep(at, [constant(channel)])))
        return
    values, undefined = load_at(builder, at), ir.Constant(VECTOR, ir.Undefined)
    for channel in channels:
        order = [lane // lanes * lanes + channel for lane in range(WIDTH)]
        indices = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), order)
        yield builder.shuffle_vector(values, undefined, indices)
