"""Activations: torch's own operators, lowered to one kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.operators.lowering import Lowering, LoweringContext, elementwise_step
from ensemble.compiler.planning.step import Activation, Kind, Step

aten = torch.ops.aten


# Operators, and their arguments after x. On CUDA the implicit GEMM takes these on too.
_OPERATORS: dict[Any, tuple[Activation, tuple[float, ...]]] = {
    aten.relu.default: (Activation.RELU, ()),
    aten.hardtanh.default: (Activation.RELU6, (0.0, 6.0)),
    aten.sigmoid.default: (Activation.SIGMOID, ()),
    aten.silu.default: (Activation.SILU, ()),
    aten.hardsigmoid.default: (Activation.HARDSIGMOID, ()),
    aten.hardswish.default: (Activation.HARDSWISH, ()),
}


def activation_in(node: fx.Node) -> Activation:
    """The activation without parameters that a node computes; `NONE` if it is no such node."""
    activation, expected = _OPERATORS.get(node.target, (Activation.NONE, ()))
    is_plain = not node.kwargs and tuple(node.args[1:]) == expected
    return activation if is_plain else Activation.NONE


def _lower(node: fx.Node, context: LoweringContext) -> list[Step]:
    x, activation = node.args[0], activation_in(node)
    if not activation or not context.is_stack(x):
        return []
    return [elementwise_step(Kind.ACTIVATION, node, context, x, activation=activation)]


def _lower_leaky_relu(node: fx.Node, context: LoweringContext) -> list[Step]:
    x, slope = (*node.args, 0.01)[:2]
    if not context.is_stack(x) or node.kwargs or not isinstance(slope, float | int):
        return []
    options: dict[str, Any] = {"activation": Activation.LEAKY_RELU, "scalar": float(slope)}
    return [elementwise_step(Kind.ACTIVATION, node, context, x, **options)]


def _lower_tanh(node: fx.Node, context: LoweringContext) -> list[Step]:
    x = node.args[0]
    if not context.is_stack(x):
        return []
    return [elementwise_step(Kind.ACTIVATION, node, context, x, activation=Activation.TANH)]


def _lower_gelu(node: fx.Node, context: LoweringContext) -> list[Step]:
    functions = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
    x, activation = node.args[0], functions.get(str(node.kwargs.get("approximate", "none")))
    if not context.is_stack(x) or activation is None:
        return []
    return [elementwise_step(Kind.ACTIVATION, node, context, x, activation=activation)]


LOWERINGS: dict[Any, Lowering] = {
    **dict.fromkeys(_OPERATORS, _lower),
    aten.leaky_relu.default: _lower_leaky_relu,
    aten.tanh.default: _lower_tanh,
    aten.gelu.default: _lower_gelu,
}

_FUNCTIONS: dict[Activation, Callable[..., Any]] = {
    Activation.RELU: lambda x, _: x.relu(),
    Activation.RELU6: lambda x, _: functional.relu6(x),
    Activation.SIGMOID: lambda x, _: x.sigmoid(),
    Activation.SILU: lambda x, _: functional.silu(x),
    Activation.HARDSIGMOID: lambda x, _: functional.hardsigmoid(x),
    Activation.HARDSWISH: lambda x, _: functional.hardswish(x),
    Activation.LEAKY_RELU: lambda x, slope: functional.leaky_relu(x, slope),
    Activation.TANH: lambda x, _: x.tanh(),
    Activation.GELU: lambda x, _: functional.gelu(x),
    Activation.GELU_TANH: lambda x, _: functional.gelu(x, approximate="tanh"),
}


def activated(step: Step, x: Tensor) -> Tensor:
    """The relu and activation of a step of any kind, by torch."""
    x = x.relu() if step.relu else x
    return activation_of(step.activation, x, step.scalar)


def activation_of(activation: Activation, x: Tensor, scalar: float = 0.0) -> Tensor:
    """An activation by torch; scalar: the slope of a leaky relu."""
    return _FUNCTIONS[activation](x, scalar) if activation else x


REFERENCES: dict[Kind, Callable[..., Tensor]] = {Kind.ACTIVATION: lambda step, _, __, x: x}
