"""Accuracy check of fast kernels: a layer whose error is too large takes a more exact kernel.

Winograd's and Strassen's algorithms add and subtract inputs before they multiply, so their rounding
error scales with the largest inputs, wherever it ends up. That is harmless where all outputs are of
one magnitude.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of
from ensemble.compiler.operators.conv2d import (
    pack_weight,
    plain_conv2d,
    stacked_conv2d,
    with_kernel,
)
from ensemble.compiler.planning.step import Kind

# The largest relative error against torch's own convolution. Randomly initialized ResNets show
# 1e-6 to 4e-6 with Winograd.
MAX_ERROR = 1e-5


class ErrorBound(Enum):
    """What `MAX_ERROR` is relative to."""

    PER_LAYER = "the largest output of the layer"
    PER_CHANNEL_AND_PIXEL = "the largest output of each channel, and of each pixel"
    NO_FAST_KERNELS = "nothing: every layer takes the direct kernel"


class KernelAccuracyCheck:
    """Compares each convolution by a fast kernel with torch's own, on the example.

    `rejections`: the layers where a kernel was rejected, with the reason.
    """

    def __init__(self, error_bound: ErrorBound) -> None:
        self._error_bound = error_bound
        self.rejections: list[str] = []

    def check(self, node: fx.Node, layer: str, values: dict[fx.Node, Any]) -> None:
        """Let a `stacked_conv2d` use the first kernel within the bound.

        values: of the node's inputs, but for the packed weight. The value of the node and of the
        packed weight are added where the check computes them.
        """
        chosen: Any
        x, packing, bias, other, chosen, kernel, *options = node.args
        packing = node_of(packing)
        if not Kind(chosen).fast_candidates:
            return
        if self._error_bound is ErrorBound.NO_FAST_KERNELS:
            with_kernel(node, Kind.DIRECT)
            return
        weight, dtype = values[node_of(packing.args[0])].float(), values[node_of(x)].dtype
        inputs: list[Any] = [
            None if operand is None else values[node_of(operand)].float()
            for operand in (x, bias, other)
        ]
        exact = _model_by_model(weight, *inputs, *options)
        problems, kind = [], Kind.DIRECT
        for candidate in Kind(chosen).fast_candidates:
            packed = pack_weight(weight, candidate)  # fast kernels have no groups
            found = stacked_conv2d(inputs[0], packed, *inputs[1:], candidate, kernel, *options)
            error = relative_error(found, exact, self._error_bound)
            if error <= MAX_ERROR:
                values[packing], values[node] = packed, found.to(dtype)
                kind = candidate
                break
            problems.append(f"{candidate.label} differs by {error:.0e}")
        with_kernel(node, kind)
        if problems:
            self.rejections.append(f"{layer}: {kind.label}, for {' and '.join(problems)}")


def relative_error(found: Tensor, exact: Tensor, error_bound: ErrorBound) -> float:
    """The largest error of any model, `(N, B, K, OH, OW)`, relative to what the bound names."""
    differences, sizes = (found - exact).abs(), exact.abs()
    is_per_layer = error_bound is ErrorBound.PER_LAYER
    groups = ((1, 2, 3, 4),) if is_per_layer else ((1, 3, 4), (2,))

    def largest(dims: tuple[int, ...]) -> Tensor:
        tiny = torch.finfo(exact.dtype).tiny
        return (differences.amax(dims) / sizes.amax(dims).clamp_min(tiny)).max()

    return max(float(largest(dims)) for dims in groups)


def _model_by_model(
    weight: Tensor,
    x: Tensor,
    bias: Tensor,
    other: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Tensor:
    """The convolution by torch, model after model."""
    images = x if x.dim() == 5 else [x] * len(weight)
    others = [None] * len(weight) if other is None else other
    return torch.stack(
        [
            plain_conv2d(stride, padding, dilation, groups, relu, *operands)
            for operands in zip(images, weight, bias, others, strict=True)
        ]
    )
