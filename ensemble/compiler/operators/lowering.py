"""From a node of the vmapped graph to steps of a program: what the operators' rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of
from ensemble.compiler.operators import support
from ensemble.compiler.planning.shape_inference import pointwise
from ensemble.compiler.planning.step import Kind, Step


@dataclass(frozen=True)
class LoweringContext:
    """What is known of the graph: its constants, and the value id of each node.

    `producers` maps a value id to the node that produces it now: the result of a program replaces
    the node that was lowered.
    """

    constants: dict[fx.Node, Tensor]
    value_ids: dict[fx.Node, int]
    producers: dict[int, fx.Node]
    num_models: int

    def tensor(self, node: Any) -> Any:
        """The constant of a node, else its fake tensor; anything that is no node, unchanged."""
        if not isinstance(node, fx.Node):
            return node
        return self.constants[node] if node in self.constants else node.meta["val"]

    def dynamic_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that depend on x."""
        return [source for source in node.all_input_nodes if source not in self.constants]

    def is_stack(self, node: Any) -> bool:
        """Does a node give a stack of images, `(N, B, C, H, W)`, that depends on x and that
        kernels support?"""
        if not isinstance(node, fx.Node) or node in self.constants:
            return False
        found = node.meta.get("val")
        if not isinstance(found, Tensor) or found.dim() != 5 or not support.is_supported(found):
            return False
        return len(found) == self.num_models and found.numel() > 0


def lowering_context(
    graph: fx.Graph, constants: dict[fx.Node, Tensor], num_models: int
) -> LoweringContext:
    """The context of a graph as it is now."""
    nodes = list(graph.nodes)
    return LoweringContext(
        constants,
        value_ids={node: index for index, node in enumerate(nodes)},
        producers=dict(enumerate(nodes)),
        num_models=num_models,
    )


# The steps that compute a node; none where kernels cannot.
Lowering = Callable[[fx.Node, LoweringContext], list[Step]]


def with_weights(make: Callable[..., Step]) -> Lowering:
    """The lowering of an operator `(x, weight, bias, ...)`. A step holds its weights, so they must
    be constants."""

    def lower(node: fx.Node, context: LoweringContext) -> list[Step]:
        weights = [weight for weight in node.args[1:3] if isinstance(weight, fx.Node)]
        if not all(weight in context.constants for weight in weights):
            return []
        step = make(*map(context.tensor, node.args))
        other = None if step.other is None else context.value_ids[node_of(node.args[3])]
        return [with_value_ids(step, node, context, node.args[0], other)]

    return lower


def without_weights(make: Callable[..., Step]) -> Lowering:
    """The lowering of an operator `(x, options...)`."""

    def lower(node: fx.Node, context: LoweringContext) -> list[Step]:
        step = make(*map(context.tensor, node.args))
        return [with_value_ids(step, node, context, node.args[0])]

    return lower


def with_value_ids(
    step: Step, node: fx.Node, context: LoweringContext, x: Any, other: int | None = None
) -> Step:
    ids = context.value_ids
    return replace(step, x=ids[node_of(x)], other=other, out=ids[node])


def elementwise_step(
    kind: Kind,
    node: fx.Node,
    context: LoweringContext,
    x: Any,
    other: fx.Node | None = None,
    **options: Any,
) -> Step:
    """An elementwise step on x."""
    like = context.tensor(x)
    channels = like.shape[-3]
    step = Step(kind, pointwise(like), 0, 0, channels=channels, out_channels=channels)
    value_id = None if other is None else context.value_ids[other]
    return with_value_ids(replace(step, **options), node, context, x, value_id)
