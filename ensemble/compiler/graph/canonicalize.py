"""Canonical forms that later passes match: no identities, means that keep their dimensions."""

from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of, value_of

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


def remove_identities(graph: fx.Graph) -> None:
    """Remove copies and reshapes that change nothing: they would separate two kernels."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if node.target is aten.reshape.default:
            if source.target is aten.reshape.default:
                node.args = (source.args[0], *node.args[1:])
            before, after = value_of(node.args[0]), value_of(node)
            same = before is not None and before.shape == after.shape
        else:
            same = node.target in _COPIES
        if same:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def keep_mean_dims(graph: fx.Graph) -> None:
    """Rewrite a mean over all pixels, `(N, B, C)`, as one with keepdim, then a reshape: the mean
    then gives images of one pixel, which kernels read and write."""
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, dims, keepdim = (*node.args, False)[:3]
        found = node_of(x).meta.get("val")
        if keepdim or node.kwargs or not isinstance(found, Tensor) or found.dim() != 5:
            continue
        if not is_over_pixels(dims):
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
