"""Constant folding: whatever depends on the weights only is computed once, at build.

The pass interprets the graph on the example. The values of dynamic nodes, which depend on x, are
used to check each layer on the inputs that it really gets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import dynamic_nodes, node_of
from ensemble.compiler.operators.conv2d import PACK_WEIGHT
from ensemble.compiler.operators.implicit_gemm import PACK_BLOCK_WEIGHT

PACKINGS = PACK_WEIGHT, PACK_BLOCK_WEIGHT

State = dict[str, Tensor]
Values = dict[fx.Node, Tensor]


class LayerCheck(Protocol):
    """Selects how a layer is computed, on its real inputs."""

    def check(self, node: fx.Node, layer: str, values: Values) -> None:
        """values: of the inputs of the node, by node; may be added to."""


@dataclass(frozen=True)
class Folded:
    """The constants that dynamic nodes read, which share no memory with the models, and the
    dynamic nodes."""

    constants: Values
    dynamic: set[fx.Node]


def fold_constants(
    module: fx.GraphModule,
    state: State,
    example: Tensor,
    checks: Mapping[Any, LayerCheck],
) -> Folded:
    """Evaluate what depends on the weights only, and check the layers.

    Args:
        module: `(*state, x)`, vmapped.
        state: stacked tensors by name, in the order of the placeholders; never written to.
            Emptied: each tensor is freed after its last use.
        example: like x. It should have contrast: the errors of fast kernels are measured on it.
        checks: of a layer by its operator, whose second argument is its packed weight.
    """
    model_storages = {_storage(tensor) for tensor in state.values()}
    *placeholders, x = module.graph.find_nodes(op="placeholder")
    layers = dict(zip(placeholders, list(state), strict=True))
    values: Values = {node: state.pop(name) for node, name in layers.items()}
    values[x] = example
    interpreter = _Interpreter(module, values)
    for node in module.graph.nodes:
        if node in values or node.op == "output":
            continue
        if check := checks.get(node.target):
            packing = node_of(node.args[1])
            check.check(node, layers.get(_first_source(packing), node.name), values)
            interpreter.evaluate(packing)
        elif node.target in PACKINGS and next(iter(node.users)).target in checks:
            continue  # packed with its convolution, whose kernel the check may replace
        interpreter.evaluate(node)
    for node in interpreter.dynamic & values.keys():
        del values[node]
    for node, value in values.items():
        if isinstance(value, Tensor) and (
            node.op == "get_attr" or _storage(value) in model_storages
        ):
            values[node] = value.clone()  # the models may change theirs later
    return Folded(values, interpreter.dynamic)


class _Interpreter:
    """Evaluates nodes and frees each value after its last use.

    The check may have evaluated a node before. A constant that a dynamic node reads stays: every
    call reads it.
    """

    def __init__(self, module: fx.GraphModule, values: Values) -> None:
        self._module, self._values = module, values
        self._uses_left = {node: len(node.users) for node in module.graph.nodes}
        self.dynamic = dynamic_nodes(module.graph)

    def evaluate(self, node: fx.Node) -> None:
        values = self._values
        if node.op == "get_attr":
            values[node] = getattr(self._module, str(node.target))
            return
        if node not in values:
            arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments, **options)  # type: ignore[operator]
        for source in node.all_input_nodes:
            if node in self.dynamic and source not in self.dynamic:
                continue
            self._uses_left[source] -= 1
            if not self._uses_left[source]:
                del values[source]


def embed_constants(module: fx.GraphModule, folded: Folded) -> None:
    """Register the constants that the graph still reads as buffers, and erase everything else that
    does not depend on x."""
    x = module.graph.find_nodes(op="placeholder")[-1]
    for node in reversed(module.graph.nodes):
        if node.users and node in folded.constants:
            name = buffer_name(node)
            module.register_buffer(name, folded.constants[node])
            with module.graph.inserting_before(x):
                node.replace_all_uses_with(module.graph.get_attr(name))
        if not node.users and node is not x and node.op != "output":
            module.graph.erase_node(node)


def buffer_name(node: fx.Node) -> str:
    """The name of the buffer that an embedded constant becomes."""
    return f"constant_{node.name}"


def evaluate_constants(module: fx.GraphModule, state: State, wanted: Collection[fx.Node]) -> Values:
    """The values of these nodes, which depend on the weights only.

    Args:
        module: `(*state, x)`, vmapped over N models.
        state: tensors by name, in the order of the placeholders: of N models, or of one
        wanted: constants of `module`.
    """
    num_models = None
    *placeholders, _ = module.graph.find_nodes(op="placeholder")
    values: Values = dict(zip(placeholders, state.values(), strict=True))
    if placeholders:
        num_models = len(placeholders[0].meta["val"])
    needed = _ancestors(wanted)
    for node in module.graph.nodes:
        if node not in needed or node in values:
            continue
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
            continue
        arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.target in _SIZED and len(state) and arguments[1][:1] == [num_models]:
            stack = next(iter(state.values()))
            arguments = (arguments[0], [len(stack), *arguments[1][1:]], *arguments[2:])
        values[node] = node.target(*arguments, **options)
    return {node: values[node] for node in wanted}


# Operators whose second argument is a size, which begins with the number of models under vmap.
_SIZED = (torch.ops.aten.reshape.default, torch.ops.aten.expand.default)


def _ancestors(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    found, left = set[fx.Node](), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _first_source(node: fx.Node) -> fx.Node:
    """The placeholder that a packed weight derives from, following first inputs."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata
