"""Activations: torch's own operators, lowered to one kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.operators.lowering import Lowering, LoweringContext, elementwise_step
from ensemble.compiler.planning.step import Activation, Kind, Step

aten = torch.ops.aten


def _lower(activation: Activation, *expected: float) -> Lowering:
    """Of `activation(x, *expected)`."""

    def lower(node: fx.Node, context: LoweringContext) -> list[Step]:
        x, *options = node.args
        if not context.is_stack(x) or node.kwargs or tuple(options) != expected:
            return []
        return [elementwise_step(Kind.ACTIVATION, node, context, x, activation=activation)]

    return lower


def _lower_leaky_relu(node: fx.Node, context: LoweringContext) -> list[Step]:
    x, slope = (*node.args, 0.01)[:2]
    if not context.is_stack(x) or node.kwargs or not isinstance(slope, float | int):
        return []
    options: dict[str, Any] = {"activation": Activation.LEAKY_RELU, "scalar": float(slope)}
    return [elementwise_step(Kind.ACTIVATION, node, context, x, **options)]


LOWERINGS: dict[Any, Lowering] = {
    aten.relu.default: _lower(Activation.RELU),
    aten.hardtanh.default: _lower(Activation.RELU6, 0.0, 6.0),
    aten.sigmoid.default: _lower(Activation.SIGMOID),
    aten.silu.default: _lower(Activation.SILU),
    aten.hardsigmoid.default: _lower(Activation.HARDSIGMOID),
    aten.hardswish.default: _lower(Activation.HARDSWISH),
    aten.leaky_relu.default: _lower_leaky_relu,
}

_FUNCTIONS: dict[Activation, Callable[..., Any]] = {
    Activation.RELU: lambda x, _: x.relu(),
    Activation.RELU6: lambda x, _: functional.relu6(x),
    Activation.SIGMOID: lambda x, _: x.sigmoid(),
    Activation.SILU: lambda x, _: functional.silu(x),
    Activation.HARDSIGMOID: lambda x, _: functional.hardsigmoid(x),
    Activation.HARDSWISH: lambda x, _: functional.hardswish(x),
    Activation.LEAKY_RELU: lambda x, slope: functional.leaky_relu(x, slope),
}


def activated(step: Step, x: Tensor) -> Tensor:
    """The relu and activation of a step of any kind, by torch."""
    x = x.relu() if step.relu else x
    return _FUNCTIONS[step.activation](x, step.scalar) if step.activation else x


REFERENCES: dict[Kind, Callable[..., Tensor]] = {Kind.ACTIVATION: lambda step, _, __, x: x}
