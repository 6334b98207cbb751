"""Operators that only move numbers about, a chain of them as one selection of `ensemble.compiler`.

Slices, halves and shuffles of channels, borders, steps over pixels, enlargement by repetition: what
such a chain does is found by sending numbered elements through it, not by knowing its operators.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.functionalize import (
    depending_on,
    is_images,
    reached,
    recompile,
    value_of,
)
from ensemble.compiler.operators import conv

aten = torch.ops.aten

_MOVES: set[Any] = {
    operator.getitem,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.expand.default,
    aten.repeat.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.channel_shuffle.default,
    aten.native_channel_shuffle.default,
}
MOST_ELEMENTS = 2**27  # of images that are numbered: 1 GB


@dataclass(frozen=True)
class Selection:
    """For each row, column and channel of the result which one of the images it is; -1: zeros."""

    rows: list[int]
    columns: list[int]
    channels: list[int]

    def is_all_of(self, images: Tensor) -> bool:
        every = [list(range(length)) for length in images.shape[1:]]
        return [self.channels, self.rows, self.columns] == every


def join_moves(module: fx.GraphModule) -> None:
    """Replace each chain of `_MOVES` from images to images, `(B, C, H, W)`, by one selection, where
    it is one: rows, columns and channels are taken independently of each other."""
    graph, on_input = module.graph, reached(module.graph)
    of_state = depending_on(graph, graph.find_nodes(op="placeholder"))
    paths: dict[fx.Node, list[fx.Node]] = {}  # from the images on, to a node that moves them
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target not in _MOVES or not isinstance(source, fx.Node) or source not in on_input:
            continue
        if any(other in of_state for other in node.all_input_nodes if other is not source):
            continue
        paths[node] = [*paths.get(source, [source]), node]
        if is_images(node) and any(user.target not in _MOVES for user in node.users):
            _join(module, paths[node])
    graph.eliminate_dead_code()
    recompile(module)


def _join(module: fx.GraphModule, path: list[fx.Node]) -> None:
    """One selection from the first images of a path from which it is one."""
    last = path[-1]
    for start, images in enumerate(path[:-1]):
        known = value_of(images)
        if not is_images(images) or known.numel() > MOST_ELEMENTS:
            continue
        found = _selection(module, path[start + 1 :], known)
        if found is None:
            continue
        made = images if found.is_all_of(known) else _select(module.graph, images, last, found)
        for user in [user for user in last.users if user.target not in _MOVES]:
            user.replace_input_with(last, made)
        return


def _select(graph: fx.Graph, images: fx.Node, last: fx.Node, found: Selection) -> fx.Node:
    arguments = (images, found.rows, found.columns, found.channels)
    with graph.inserting_after(last):
        made = graph.call_function(torch.ops.ensemble.select.default, arguments)
    made.meta["val"] = value_of(last)
    return made


def _selection(module: fx.GraphModule, moves: list[fx.Node], like: Tensor) -> Selection | None:
    """What a chain of moves takes of images, or None where that is no selection."""
    total = like.numel()
    # Not the device's, and no fake tensor: the numbers are what is asked for.
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        numbers = torch.arange(1, total + 1, dtype=torch.float64, device="cpu").view(like.shape)
        first, second = (_sent(module, moves, sent) for sent in (numbers, numbers + total))
        if first.dim() != 4 or len(first) != len(like) or not first.numel():
            return None
        if not bool(((second - first == total) | ((first == 0) & (second == 0))).all()):
            return None
        places = first.long() - 1
        _, count, height, width = like.shape
        dims = (0, 2, 3), (0, 1, 3), (0, 1, 2)
        parts = places // (height * width) % count, places // width % height, places % width
        channels, rows, columns = (
            part.where(places >= 0, -1).amax(dim) for part, dim in zip(parts, dims, strict=True)
        )
        found = Selection(rows.tolist(), columns.tolist(), channels.tolist())
        taken = conv.plain_select(numbers, found.rows, found.columns, found.channels)
        return found if torch.equal(taken, first) else None


def _sent(module: fx.GraphModule, moves: list[fx.Node], value: Any) -> Tensor:
    """What the moves make of a value."""

    def constant(node: fx.Node) -> Any:
        """What a node gives that depends on nothing: indices, say."""
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        return _call(node, *fx.node.map_arg(node.args, constant))

    for node in moves:
        value = _call(node, value, *fx.node.map_arg(node.args[1:], constant))
    assert isinstance(value, Tensor)
    return value


def _call(node: fx.Node, *arguments: Any) -> Any:
    assert callable(node.target)
    options = {name: value for name, value in node.kwargs.items() if name != "device"}
    return node.target(*arguments, **options)
