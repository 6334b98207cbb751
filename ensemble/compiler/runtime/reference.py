"""The operations of a program by torch's own operators, one model at a time, in float32.

What a program returns where its kernels' numbers are not finite, and what these are tested against.
Values are `(B, C, H, W)`, without the channels that fill up vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler import kernels
from ensemble.compiler.operators import conv
from ensemble.compiler.planning.operation import Function, Kind, Operation
from ensemble.compiler.planning.vector_layout import weight_out_of_vectors, weight_shape


class Reference:
    """Operations in order, for N models. Their weights are unpacked here, and kept.

    Where a weight is not finite, others of its filter may become NaN, and with Strassen's products
    other filters of its layer too.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations
        self._weights = [unpacked_weight(step) for step in operations]
        self._last_read = {
            value: index for index, step in enumerate(operations) for value in step.reads
        }

    def __call__(
        self, model: int, inputs: Mapping[int, Tensor], outputs: Collection[int]
    ) -> dict[int, Tensor]:
        """One model's outputs, of the values that a call brings; both by their numbers."""
        values = {value: _as_torch_has_it(x) for value, x in inputs.items()}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for index, step in enumerate(self._operations):
                weights = (
                    None if stack is None else stack[model]
                    for stack in (self._weights[index], step.bias)
                )
                operands = (values[value] for value in step.reads)
                result = _activated(step, _OPERATORS[step.kind](step, *weights, *operands))
                if step.kind == Kind.COPY and step.out in values:
                    result += values[step.out]
                values[step.out] = result
                for value in {*step.reads} - {*outputs}:
                    if self._last_read[value] == index:
                        del values[value]
        return {value: values[value] for value in outputs}


def unpacked_weight(step: Operation) -> Tensor | None:
    """A convolution's weights, `(N, K, C, R, S)`, in float32; those of other steps as they are."""
    if step.weight is None or kernels.KERNELS[step.kind].unpack is None:
        return step.weight
    shape = len(step.weight), *weight_shape(step.geometry)
    whole = kernels.unpack(step.weight, step.kind, shape)
    real = _channels(step), _out_channels(step)
    return _as_torch_has_it(weight_out_of_vectors(whole, step.geometry, real))


def _as_torch_has_it(x: Tensor) -> Tensor:
    """In float32 and in the order of the dimensions: channels-last torch sums in another order, and
    has its overflows elsewhere."""
    return x.float().clone(memory_format=torch.contiguous_format)


def _channels(step: Operation) -> int:
    return step.channels or step.geometry.channels


def _out_channels(step: Operation) -> int:
    return step.out_channels or step.geometry.out_channels


def _activated(step: Operation, x: Tensor) -> Tensor:
    x = x.relu() if step.relu else x
    return _FUNCTIONS[step.function](x, step.number) if step.function else x


def _convolution(
    step: Operation, weight: Tensor, bias: Tensor, x: Tensor, other: Tensor | None = None
) -> Tensor:
    of = step.geometry
    sizes = of.stride, of.padding, of.dilation, of.groups
    return conv.plain_conv2d(*sizes, False, x, weight, bias[: _out_channels(step)], other)


def _max_pool(step: Operation, _: None, __: None, x: Tensor) -> Tensor:
    of = step.geometry
    ceil_mode = _has_partial_window(step)
    return functional.max_pool2d(x, of.kernel, of.stride, of.padding, ceil_mode=ceil_mode)


def _average_pool(step: Operation, _: None, __: None, x: Tensor) -> Tensor:
    of = step.geometry
    if of.kernel == of.size and of.out_size == (1, 1) and of.padding == (0, 0):
        return x.mean((-2, -1), keepdim=True)
    options = _has_partial_window(step), bool(step.option)
    return functional.avg_pool2d(x, of.kernel, of.stride, of.padding, *options)


def _has_partial_window(step: Operation) -> bool:
    """Does a pooling have a last window that is not full?"""
    of = step.geometry
    return any(
        (count - 1) * stride + taps > length + 2 * pad
        for count, stride, taps, length, pad in zip(
            of.out_size, of.stride, of.kernel, of.size, of.padding, strict=True
        )
    )


def _affine(step: Operation, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    scale, shift = (stack[: _channels(step), None, None] for stack in (weight, bias))
    return x * scale + shift


def _group_norm(step: Operation, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    channels = _channels(step)
    groups = channels // step.geometry.shares[0]
    return functional.group_norm(x, groups, weight[:channels], bias[:channels], step.number)


def _copy(step: Operation, _: None, __: None, x: Tensor) -> Tensor:
    """x at its place in a concatenation, between zeros."""
    behind = _out_channels(step) - step.option - x.shape[-3]
    return functional.pad(x, (0, 0, 0, 0, step.option, behind))


def _select(step: Operation, table: Tensor, _: None, x: Tensor) -> Tensor:
    return conv.plain_select(x, *kernels.selected(table, step.geometry, _out_channels(step)))


_OPERATORS: dict[Kind, Callable[..., Tensor]] = {
    **{kind: _convolution for kind, kernel in kernels.KERNELS.items() if kernel.unpack},
    Kind.MAX_POOL: _max_pool,
    Kind.AVERAGE_POOL: _average_pool,
    Kind.ACTIVATION: lambda step, _, __, x: x,
    Kind.SUM: lambda step, _, __, x, other: x + other,
    Kind.SCALE: lambda step, _, __, x, other: x * other,
    Kind.AFFINE: _affine,
    Kind.COPY: _copy,
    Kind.SELECT: _select,
    Kind.GROUP_NORM: _group_norm,
}

_FUNCTIONS: dict[Function, Callable[..., Any]] = {
    Function.RELU: lambda x, _: x.relu(),
    Function.RELU6: lambda x, _: functional.relu6(x),
    Function.SIGMOID: lambda x, _: x.sigmoid(),
    Function.SILU: lambda x, _: functional.silu(x),
    Function.HARDSIGMOID: lambda x, _: functional.hardsigmoid(x),
    Function.HARDSWISH: lambda x, _: functional.hardswish(x),
    Function.LEAKY_RELU: lambda x, slope: functional.leaky_relu(x, slope),
}
