"""Which memory the nodes of a graph share, and which they write: what a pass may move or reuse.

What is not known to give fresh memory may give a view of any of its inputs, and what is not known
to read only may write all of them: a node that is missing here costs speed, and never a result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ensemble.passes.tracing import is_bare, signature

Nodes = frozenset[fx.Node]

OVERWRITES = "overwrites"  # in a node's meta: fresh to those after it, in its second input's memory

_FRESH_MODULES = {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d}
_READING_MODULES = {*_FRESH_MODULES, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity}
_FRESH_FUNCTIONS: set[Callable[..., Any]] = {operator.add, operator.mul, torch.add, torch.relu}
_READING_FUNCTIONS: set[Callable[..., Any]] = {
    *_FRESH_FUNCTIONS,
    operator.getitem,
    getattr,
    torch.flatten,
    torch.cat,
}


@dataclass(frozen=True)
class Effects:
    """Of a graph as it is now: the order of its nodes, and the nodes whose memory each may hold.

    A node that forms fresh memory holds itself alone.
    """

    module: fx.GraphModule
    order: dict[fx.Node, int]
    held: dict[fx.Node, Nodes]

    def may_run_at(self, node: fx.Node, place: fx.Node, *, reading: fx.Node) -> bool:
        """Does `node`, which reads `reading`, find the same there if it runs later, at `place`?"""
        between = range(self.order[node] + 1, self.order[place])
        return not any(
            self._written(other) & self.held[reading]
            for other, at in self.order.items()
            if at in between
        )

    def is_free_after(self, fresh: fx.Node, last: fx.Node) -> bool:
        """Is `fresh` a module's own result, that nothing after `last` reads, in no view of it?"""
        return (
            fresh.op == "call_module"
            and self.held[fresh] == {fresh}
            and not any(
                fresh in self.held[source]
                for node, at in self.order.items()
                if at > self.order[last]
                for source in node.all_input_nodes
            )
        )

    def _written(self, node: fx.Node) -> Nodes:
        sources = node.all_input_nodes
        if OVERWRITES in node.meta:
            sources = sources[1:] if node.meta[OVERWRITES] else []
        elif _is(node, self.module, _READING_MODULES, _READING_FUNCTIONS):
            sources = []
        return _union(self.held, sources)


def effects(module: fx.GraphModule, *, fresh: fx.Node) -> Effects:
    """The effects of a signed graph, if `fresh` forms memory of its own."""
    tensors = frozenset(module.graph.find_nodes(op="get_attr"))  # tied, or views of one another
    held: dict[fx.Node, Nodes] = dict.fromkeys(tensors, tensors)
    for node in module.graph.nodes:
        if node in tensors:
            continue
        forms_own = (
            node is fresh
            or OVERWRITES in node.meta
            or (signature(node) and _is(node, module, _FRESH_MODULES, _FRESH_FUNCTIONS))
        )
        held[node] = frozenset({node}) | (
            frozenset() if forms_own else _union(held, node.all_input_nodes)
        )
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    return Effects(module, order, held)


def _union(held: dict[fx.Node, Nodes], nodes: list[fx.Node]) -> Nodes:
    return frozenset().union(*(held[node] for node in nodes))


def _is(
    node: fx.Node,
    module: fx.GraphModule,
    modules: set[type[nn.Module]],
    functions: set[Callable[..., Any]],
) -> bool:
    if node.op == "call_module":
        submodule = module.get_submodule(str(node.target))
        return type(submodule) in modules and is_bare(submodule)
    if node.op == "call_function":
        return node.target in functions and "out" not in node.kwargs
    return node.op in ("placeholder", "get_attr", "output")
