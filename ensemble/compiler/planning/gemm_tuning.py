"""The precision and the tile of each convolution by implicit GEMM, selected on its real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.cuda.problem import DotPrecision, rounded_to_tf32
from ensemble.compiler.cuda.tiles import Tile
from ensemble.compiler.cuda.tuning import TileTuner
from ensemble.compiler.graph.analysis import node_of
from ensemble.compiler.operators.implicit_gemm import (
    pack_block_weight,
    plain_conv2d_block,
    precision_of,
    problem_of,
    stacked_conv2d_block,
)
from ensemble.compiler.planning.kernel_accuracy import MAX_ERROR, ErrorBound, relative_error


class GemmTuning:
    """Selects the tile by `tuner`; float32 layers whose error in three TF32 products is too large
    are computed without tensor cores.

    `rejections`: those layers, with the error.
    """

    def __init__(self, precision: DotPrecision, tuner: TileTuner, error_bound: ErrorBound) -> None:
        """precision: of float32 products; the error of `TF32X3` is checked, that of `TF32` is what
        the caller asks for."""
        if error_bound is ErrorBound.NO_FAST_KERNELS and precision is DotPrecision.TF32X3:
            precision = DotPrecision.IEEE
        self._precision, self._error_bound = precision, error_bound
        self.tuner = tuner
        self.rejections: list[str] = []

    def check(self, node: fx.Node, layer: str, values: dict[fx.Node, Any]) -> None:
        """Set the precision and the tile of a `stacked_conv2d_block`.

        values: of the node's inputs, but for the packed weight. That and the value of the node are
        added.
        """
        packing = node_of(node.args[1])
        if packing not in values:
            weights = pack_block_weight(*_given(packing.args, values))
            is_tf32 = self._precision is DotPrecision.TF32 and weights.dtype == torch.float32
            values[packing] = rounded_to_tf32(weights) if is_tf32 else weights
        tensors = tuple(_given(node.args[:5], values))
        found = self._compute(node, tensors, self._precision)
        if precision_of(node) is DotPrecision.TF32X3:
            exact = _exact(node, _given(packing.args[:2], values), tensors)
            error = relative_error(found, exact, self._error_bound)
            if not error <= MAX_ERROR:
                found = self._compute(node, tensors, DotPrecision.IEEE)
                reason = f"three TF32 products differ by {error:.0e}"
                self.rejections.append(f"{layer}: without tensor cores, for {reason}")
        values[node] = found

    def _compute(self, node: fx.Node, tensors: tuple[Any, ...], precision: DotPrecision) -> Tensor:
        """The layer in a precision, and in the tile that is selected for it."""
        x = tensors[0]
        precision = precision if x.dtype == torch.float32 else DotPrecision.IEEE
        options: tuple[Any, ...] = node.args[5:-2]
        arguments = *tensors, *options, str(precision)
        problem = problem_of(*arguments)

        def run(tile: Tile) -> Tensor:
            return stacked_conv2d_block(*arguments, list(tile.fields))

        tile = self.tuner.select(problem, x.device, run)
        node.args = (*node.args[:-2], str(precision), list(tile.fields))
        return run(tile)


def _given(arguments: Sequence[Any], values: dict[fx.Node, Any]) -> list[Any]:
    """The values of nodes; anything that is no node, unchanged."""
    return [values[one] if isinstance(one, fx.Node) else one for one in arguments]


def _exact(node: fx.Node, weights: Sequence[Any], tensors: Sequence[Any]) -> Tensor:
    """The layer in float64, model after model, by torch."""
    options: tuple[Any, ...] = node.args[7:-2]  # without the sizes of the filters
    x, _, bias, other, shortcut = (_double(tensor) for tensor in tensors)
    weight, shortcut_weight = map(_double, weights)
    results = []
    for model in range(len(weight)):
        own = [
            None if stack is None else stack[model]
            for stack in (weight, bias, other, shortcut, shortcut_weight)
        ]
        images = x if x.dim() == 4 else x[model]
        # bias is that of both convolutions
        arguments: tuple[Any, ...] = images, *own, None, *options
        results.append(plain_conv2d_block(*arguments))
    return torch.stack(results)


def _double(tensor: Any) -> Any:
    return None if tensor is None else tensor.double()
