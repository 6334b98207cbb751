"""Rewrite a graph of one model node by node: what passes over ATen operators share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from ensemble.compiler.graph.analysis import dynamic_nodes, is_images, value_of
from ensemble.compiler.graph.graph_module import recompile

aten = torch.ops.aten


class Rewriter:
    """A graph, and its dynamic nodes: those that depend on the input."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.dynamic = graph, dynamic_nodes(graph)
        self.batch = len(value_of(graph.find_nodes(op="placeholder")[-1]))

    def is_images(self, node: object) -> bool:
        """Does it give `(B, C, H, W)`, and depend on the input?"""
        return node in self.dynamic and is_images(node)

    def is_constant(self, *nodes: object) -> bool:
        """Are they all independent of the input?"""
        return not any(node in self.dynamic for node in nodes)

    def before(self, node: fx.Node) -> AbstractContextManager[None]:
        """A context in which new nodes are inserted before this one."""
        return self.graph.inserting_before(node)

    def call(self, target: Callable[..., Any], *arguments: Any, like: fx.Node | None) -> fx.Node:
        """A new node; like: the dynamic node whose fake value it takes over, if any."""
        node = self.graph.call_function(target, arguments)
        if like is not None:
            node.meta["val"] = like.meta["val"]
            self.dynamic.add(node)
        return node

    def replace(self, node: fx.Node, target: Callable[..., Any], *arguments: Any) -> fx.Node:
        with self.before(node):
            made = self.call(target, *arguments, like=node)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return made

    def gives_one(self, node: fx.Node) -> bool:
        """Is the first of several results the only one read? The node then gives it directly."""
        users = list(node.users)
        if len(users) != 1 or users[0].args[1] != 0:
            return False
        node.meta["val"] = value_of(users[0])
        self.drop(users[0], node)
        return True

    def drop(self, node: fx.Node, value: fx.Node) -> None:
        """Replace a node by another one that gives the same."""
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def reshaped(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """x, dynamic, in another shape."""
        result = self.call(aten.reshape.default, x, list(shape), like=x)
        result.meta["val"] = value_of(x).reshape(shape)
        return result


Rewrite = Callable[[Rewriter, fx.Node], object]


def apply(rewrites: Mapping[Any, Rewrite], module: fx.GraphModule) -> None:
    """Apply the rule of each dynamic node's operator; nodes without keyword arguments only."""
    rewriter = Rewriter(module.graph)
    for node in list(module.graph.nodes):
        rewrite = rewrites.get(node.target)
        if rewrite is not None and node in rewriter.dynamic and not node.kwargs:
            rewrite(rewriter, node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    recompile(module)


def with_defaults(node: fx.Node) -> list[Any]:
    """A node's arguments, completed by their defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    known = node.target._schema.arguments[len(node.args) :]
    return [*node.args, *(argument.default_value for argument in known)]


def pair(size: Any) -> list[int]:
    """A size as (y, x), from a pair or one number for both."""
    return [int(size[0]), int(size[-1])] if isinstance(size, Sequence) else [int(size)] * 2
