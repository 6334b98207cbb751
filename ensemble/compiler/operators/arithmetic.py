"""Sums of two stacks, and products by one factor per channel: torch's own operators, lowered."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of
from ensemble.compiler.operators.lowering import Lowering, LoweringContext, elementwise_step
from ensemble.compiler.planning.step import Kind, Step


def _lower_add(node: fx.Node, context: LoweringContext) -> list[Step]:
    x, other = node.args[:2]
    if node.kwargs or not (context.is_stack(x) and context.is_stack(other)):
        return []
    if context.tensor(x).shape != context.tensor(other).shape:
        return []
    return [elementwise_step(Kind.SUM, node, context, x, node_of(other))]


def _lower_multiply(node: fx.Node, context: LoweringContext) -> list[Step]:
    """All pixels by one factor per image and channel: squeeze and excitation."""
    if not all(map(context.is_stack, node.args[:2])):
        return []
    for x, factors in (node.args[:2], node.args[1::-1]):
        if context.tensor(factors).shape == (*context.tensor(x).shape[:3], 1, 1):
            return [elementwise_step(Kind.SCALE, node, context, x, node_of(factors))]
    return []


LOWERINGS: dict[Any, Lowering] = {
    torch.ops.aten.add.Tensor: _lower_add,
    torch.ops.aten.mul.Tensor: _lower_multiply,
}

REFERENCES: dict[Kind, Callable[..., Tensor]] = {
    Kind.SUM: lambda step, _, __, x, other: x + other,
    Kind.SCALE: lambda step, _, __, x, other: x * other,
}
