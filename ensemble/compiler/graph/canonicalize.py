"""Canonical forms that later passes match: no identities and expansions, means that keep their
dimensions."""

from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of, value_of

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)

# Operators, and the second operand that leaves the first as it is.
_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
}


def remove_identities(graph: fx.Graph) -> None:
    """Remove copies, reshapes and arithmetic that change nothing: they would separate two
    kernels."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if node.target is aten.reshape.default:
            if source.target is aten.reshape.default:
                node.args = (source.args[0], *node.args[1:])
            before, after = value_of(node.args[0]), value_of(node)
            same = before is not None and before.shape == after.shape
        elif node.target in _NEUTRAL:
            same = _is_neutral(node)
        else:
            same = node.target in _COPIES
        if same:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _is_neutral(node: fx.Node) -> bool:
    """Does arithmetic return its first operand? A number may promote its dtype."""
    x, *rest = node.args
    before, after = value_of(x), value_of(node)
    known = isinstance(before, Tensor) and isinstance(after, Tensor)
    neutral = isinstance(rest[0], int | float) and rest[0] == _NEUTRAL[node.target]
    return known and neutral and not node.kwargs and before.dtype == after.dtype


def drop_expansions(graph: fx.Graph) -> None:
    """Let arithmetic broadcast an operand that was expanded for it: kernels then multiply by one
    factor per channel, instead of by images."""
    for target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        for node in graph.find_nodes(op="call_function", target=target):
            for index, expanded in enumerate(node.args[:2]):
                if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
                    continue
                small, other = node_of(expanded.args[0]), value_of(node.args[1 - index])
                if not isinstance(other, Tensor):
                    continue
                shape = torch.broadcast_shapes(value_of(small).shape, other.shape)
                if shape == value_of(node).shape:
                    node.update_arg(index, small)
    graph.eliminate_dead_code()


def keep_mean_dims(graph: fx.Graph) -> None:
    """Rewrite a mean over all pixels, `(B, C)`, as one with keepdim, then a reshape: the mean then
    gives images of one pixel, which kernels read and write."""
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, dims, keepdim = (*node.args, False)[:3]
        found = node_of(x).meta.get("val")
        if keepdim or node.kwargs or not isinstance(found, Tensor) or found.dim() != 4:
            continue
        if not isinstance(dims, list | tuple) or sorted(dim % 4 for dim in dims) != [2, 3]:
            continue
        mean = node.meta["val"]
        with graph.inserting_after(node):
            flat = graph.call_function(aten.reshape.default, (node, list(mean.shape)))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
        node.args, node.meta["val"] = (x, dims, True), mean[..., None, None]


def is_over_pixels(dims: Any) -> bool:
    """Are these height and width of a stack `(N, B, C, H, W)`?"""
    return isinstance(dims, list | tuple) and sorted(dim % 5 for dim in dims) == [3, 4]
