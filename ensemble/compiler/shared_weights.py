"""Packed weights, which the programs of all shapes share, and where each model's part lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import dynamic_nodes, node_of, weight_nodes
from ensemble.compiler.graph.constant_folding import (
    Folded,
    State,
    Values,
    buffer_name,
    evaluate_constants,
)
from ensemble.compiler.graph.expressions import Key, expression_keys
from ensemble.compiler.operators import support
from ensemble.compiler.operators.conv2d import STACKED_CONV2D, conv_geometry_of, with_kernel
from ensemble.compiler.operators.lowering import lowering_context
from ensemble.compiler.planning.kernel_selection import lower
from ensemble.compiler.planning.step import Kind, Step
from ensemble.errors import UnavailableError


@dataclass(frozen=True)
class SharedWeights:
    """The constants of N models by the expression that computes them, and the kernel that each
    convolution's weight is packed for."""

    constants: dict[Key, Tensor] = field(default_factory=dict)
    kinds: dict[Key, list[Kind]] = field(default_factory=dict)

    def add(self, module: fx.GraphModule, names: Sequence[str], constants: Values) -> None:
        """Add the constants of a graph whose kernels are selected."""
        keys = expression_keys(module, names)
        for node, value in constants.items():
            self.constants.setdefault(keys[node], value)
        for conv in module.graph.find_nodes(op="call_function", target=STACKED_CONV2D):
            weight = node_of(conv.args[1]).args[0]
            kinds = self.kinds.setdefault(keys[node_of(weight)], [])
            if (kind := Kind(conv.args[4])) not in kinds:
                kinds.append(kind)

    def restore(self, module: fx.GraphModule, names: Sequence[str]) -> Folded:
        """The constants of a graph of another shape, whose convolutions take the kernels that their
        weights are packed for.

        Raises:
            UnavailableError: it needs other weights.
        """
        keys = expression_keys(module, names)
        for conv in module.graph.find_nodes(op="call_function", target=STACKED_CONV2D):
            weight = node_of(node_of(conv.args[1]).args[0])
            geometry, kinds = conv_geometry_of(conv), self.kinds.get(keys[weight], ())
            able = [kind for kind in kinds if support.kernels.can_run(kind, geometry)]
            if able and geometry.groups == 1 and Kind(conv.args[4]) not in able:
                with_kernel(conv, able[0])
        keys = expression_keys(module, names)
        dynamic, of_state = dynamic_nodes(module.graph), weight_nodes(module.graph)
        wanted = [node for node in keys if _is_read(node, dynamic)]
        missing = [n for n in wanted if keys[n] not in self.constants]
        if any(node in of_state for node in missing):
            raise UnavailableError(
                "inputs of this shape need weights in another layout than those that this forward"
                " holds; build another forward with an example of that shape"
            )
        unread = torch.empty(0, dtype=torch.float32, device="cpu")
        state = dict.fromkeys(names, unread)
        found = evaluate_constants(module, state, missing)
        self.constants.update({keys[node]: value for node, value in found.items()})
        return Folded({node: self.constants[keys[node]] for node in wanted}, dynamic)


def _is_of_one(value: Tensor, stack: Tensor) -> bool:
    """Is a value like one of a stack, `(1, ...)`?"""
    return value.shape == (1, *stack.shape[1:])


def _is_read(node: fx.Node, dynamic: set[fx.Node]) -> bool:
    """Does a call read this constant?"""
    return any(user in dynamic or user.op == "output" for user in node.users)


@dataclass(frozen=True)
class WeightMap:
    """Which tensors a compiled forward reads its weights from.

    Attributes:
        module: the vmapped graph, with its kernels selected, before it became programs.
        names: of the models' tensors that it reads.
        steps: of its nodes.
        buffers: embedded constants, by the name of their buffer.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    steps: dict[str, tuple[Step, ...]]
    buffers: Mapping[str, Tensor]

    def constants_of(self, tensors: State, num_models: int) -> dict[Key, Tensor]:
        """The constants of one model with these tensors, each `(1, ...)`, by key.

        Raises:
            UnavailableError: a constant cannot be computed for one model alone.
        """
        keys = expression_keys(self.module, self.names)
        dynamic, of_state = dynamic_nodes(self.module.graph), weight_nodes(self.module.graph)
        wanted = [
            node for node in self.module.graph.nodes if node in of_state and _is_read(node, dynamic)
        ]
        one = {name: tensors[name][None] for name in self.names}
        with suppress(Exception):  # the graph may hold the number of models in other places
            values = evaluate_constants(self.module, one, wanted)
            if all(_is_of_one(values[node], node.meta["val"]) for node in wanted):
                return {keys[node]: values[node] for node in wanted}
        alike = {name: t.expand(num_models, *t.shape[1:]).contiguous() for name, t in one.items()}
        values = evaluate_constants(self.module, alike, wanted)
        for node in wanted:
            if node.meta["val"].shape[:1] != (num_models,):
                raise UnavailableError(
                    f"models of this architecture cannot be replaced: their constant {node.name} is"
                    " not stacked by model; build another forward"
                )
        return {keys[node]: values[node][:1] for node in wanted}

    def writes(
        self, shared: SharedWeights, constants: Mapping[Key, Tensor], num_models: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (tensor of all models `(N, ...)`, that of the new model `(1, ...)`).

        constants: of the new model, by `constants_of`.
        """
        keys, of_state = expression_keys(self.module, self.names), weight_nodes(self.module.graph)
        known = {**shared.constants, **constants}
        values: Values = {node: known[key] for node, key in keys.items() if key in known}
        context = lowering_context(self.module.graph, values, num_models)
        for node in self.module.graph.nodes:
            if node in of_state and (name := buffer_name(node)) in self.buffers:
                yield self.buffers[name], values[node]
            if node.name not in self.steps or of_state.isdisjoint(node.all_input_nodes):
                continue
            for own, new in zip(self.steps[node.name], lower(node, context), strict=True):
                for operand in ("weight", "bias"):
                    target, source = getattr(own, operand), getattr(new, operand)
                    if target is not None:
                        yield target, source
