"""The steps of a program by torch's own operators, one model at a time, in float32.

The fallback for results that are not finite, and the reference that tests compare kernels with.
Values are `(B, C, H, W)` without padding channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ensemble.compiler import kernels
from ensemble.compiler.operators import REFERENCES
from ensemble.compiler.operators.activation import activated
from ensemble.compiler.planning.step import Kind, Step
from ensemble.compiler.planning.vector_layout import weight_out_of_vectors, weight_shape


class Reference:
    """Steps in order, for N models. Weights are unpacked once, and kept.

    Where a weight is not finite, others of its filter may become NaN, and with Strassen's algorithm
    other filters of its layer too.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._weights = [unpacked_weight(step) for step in steps]
        self._last_read = {value: index for index, step in enumerate(steps) for value in step.reads}

    def __call__(
        self, model: int, inputs: Mapping[int, Tensor], outputs: Collection[int]
    ) -> dict[int, Tensor]:
        """One model's outputs from its inputs, both by value id."""
        values = {value: _contiguous_float32(x) for value, x in inputs.items()}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for index, step in enumerate(self._steps):
                weights = (
                    None if stack is None else stack[model]
                    for stack in (self._weights[index], step.bias)
                )
                operands = (values[value] for value in step.reads)
                result = activated(step, REFERENCES[step.kind](step, *weights, *operands))
                if step.kind == Kind.COPY and step.out in values:
                    result += values[step.out]
                values[step.out] = result
                for value in {*step.reads} - {*outputs}:
                    if self._last_read[value] == index:
                        del values[value]
        return {value: values[value] for value in outputs}


def unpacked_weight(step: Step) -> Tensor | None:
    """A convolution's weights, `(N, K, C, R, S)`, in float32; those of other steps unchanged."""
    if step.weight is None or kernels.KERNELS[step.kind].unpack is None:
        return step.weight
    shape = len(step.weight), *weight_shape(step.geometry)
    padded = kernels.unpack(step.weight, step.kind, shape)
    unpadded = step.unpadded_channels, step.unpadded_out_channels
    return _contiguous_float32(weight_out_of_vectors(padded, step.geometry, unpadded))


def _contiguous_float32(x: Tensor) -> Tensor:
    """A contiguous copy: on channels-last tensors torch sums in another order, and overflows at
    other places."""
    return x.float().clone(memory_format=torch.contiguous_format)
