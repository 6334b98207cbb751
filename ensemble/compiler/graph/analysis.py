"""Queries on a graph: fake values of nodes, dependence on the input, random operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def is_images(node: object) -> bool:
    """Does a node give `(B, C, H, W)`?"""
    known = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(known, Tensor) and known.dim() == 4


def value_of(node: object) -> Any:
    """The fake tensor that a node gives; anything that is no node, unchanged."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def node_of(value: object) -> fx.Node:
    """An argument that must be a node, typed as one."""
    assert isinstance(value, fx.Node)
    return value


def dynamic_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The input, which is the last placeholder, and all nodes that depend on it."""
    return dependents(graph, graph.find_nodes(op="placeholder")[-1:])


def weight_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on the weights, which are all other placeholders, and not on the
    input."""
    return dependents(graph, graph.find_nodes(op="placeholder")[:-1]) - dynamic_nodes(graph)


def dependents(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all nodes that depend on one of them."""
    found = set(nodes)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


_WITHOUT_ARITHMETIC = frozenset(
    {
        *(aten.reshape.default, aten.permute.default, aten.transpose.int, aten.expand.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int),
        *(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default),
        *(aten.unbind.int, aten.clone.default, aten.alias.default),
    }
)


def operators_by_torch(graph: fx.Graph) -> dict[str, int]:
    """The operators of a graph with programs that torch runs at each call, by name: how many of
    each. Without views and copies."""
    names = Counter(
        node.target._schema.name.partition("::")[2]
        for node in dynamic_nodes(graph)
        if isinstance(node.target, torch._ops.OpOverload) and node.target not in _WITHOUT_ARITHMETIC
    )
    return dict(names.most_common())


def is_random(node: fx.Node) -> bool:
    """Does a node draw random numbers?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    off = given.get("dropout_p", 0.0 if "dropout_p" in names else None) == 0.0
    return not off and given.get("training", given.get("train")) is not False
