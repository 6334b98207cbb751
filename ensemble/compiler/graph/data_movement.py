"""Fold each chain of data-movement operators into one gather.

Slices, splits and shuffles of channels, padding, strided slices, nearest upsampling. The pass runs
a chain on numbered elements and reads the gather off the result: it needs no rule per operator.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import dependents, dynamic_nodes, is_images, value_of
from ensemble.compiler.graph.graph_module import recompile
from ensemble.compiler.operators.gather import GATHER, plain_gather

aten = torch.ops.aten

_DATA_MOVEMENT: set[Any] = {
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
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten.channel_shuffle.default,
    aten.native_channel_shuffle.default,
}
MAX_ELEMENTS = 2**27  # of numbered images: 1 GB


@dataclass(frozen=True)
class Gather:
    """For each row, column and channel of the result its source; -1: zeros."""

    rows: list[int]
    columns: list[int]
    channels: list[int]

    def is_identity(self, images: Tensor) -> bool:
        every = [list(range(length)) for length in images.shape[1:]]
        return [self.channels, self.rows, self.columns] == every


def fold_data_movement(module: fx.GraphModule) -> None:
    """Replace each chain of data movement from images to images, `(B, C, H, W)`, by one gather.

    A chain is a gather if it takes rows, columns and channels independently of each other; others
    stay.
    """
    graph, dynamic = module.graph, dynamic_nodes(module.graph)
    of_state = dependents(graph, graph.find_nodes(op="placeholder"))
    chains: dict[fx.Node, list[fx.Node]] = {}  # a node -> its source images, the chain to itself
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if (
            node.target not in _DATA_MOVEMENT
            or not isinstance(source, fx.Node)
            or source not in dynamic
        ):
            continue
        if any(other in of_state for other in node.all_input_nodes if other is not source):
            continue
        chains[node] = [*chains.get(source, [source]), node]
        if is_images(node) and any(user.target not in _DATA_MOVEMENT for user in node.users):
            _fold(module, chains[node])
    graph.eliminate_dead_code()
    recompile(module)


def _fold(module: fx.GraphModule, chain: list[fx.Node]) -> None:
    """Replace the longest end of a chain that is a gather."""
    last = chain[-1]
    for start, images in enumerate(chain[:-1]):
        known = value_of(images)
        if not is_images(images) or known.numel() > MAX_ELEMENTS:
            continue
        found = _as_gather(module, chain[start + 1 :], known)
        if found is None:
            continue
        result = images if found.is_identity(known) else _gather(module.graph, images, last, found)
        for user in [user for user in last.users if user.target not in _DATA_MOVEMENT]:
            user.replace_input_with(last, result)
        return


def _gather(graph: fx.Graph, images: fx.Node, last: fx.Node, found: Gather) -> fx.Node:
    arguments = (images, found.rows, found.columns, found.channels)
    with graph.inserting_after(last):
        result = graph.call_function(GATHER, arguments)
    result.meta["val"] = value_of(last)
    return result


def _as_gather(module: fx.GraphModule, chain: list[fx.Node], like: Tensor) -> Gather | None:
    """A chain as a gather from images, or None where it is none."""
    total = like.numel()
    # On the CPU, and not as fake tensors: the values are needed.
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        numbers = torch.arange(1, total + 1, dtype=torch.float64, device="cpu").view(like.shape)
        first, second = (_run(module, chain, given) for given in (numbers, numbers + total))
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
        found = Gather(rows.tolist(), columns.tolist(), channels.tolist())
        gathered = plain_gather(numbers, found.rows, found.columns, found.channels)
        return found if torch.equal(gathered, first) else None


def _run(module: fx.GraphModule, chain: list[fx.Node], value: Any) -> Tensor:
    """The result of a chain for a value."""

    def constant(node: fx.Node) -> Any:
        """The value of a node that depends on no placeholder, such as indices."""
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        return _call(node, *fx.node.map_arg(node.args, constant))

    for node in chain:
        value = _call(node, value, *fx.node.map_arg(node.args[1:], constant))
    assert isinstance(value, Tensor)
    return value


def _call(node: fx.Node, *arguments: Any) -> Any:
    assert callable(node.target)
    options = {name: value for name, value in node.kwargs.items() if name != "device"}
    return node.target(*arguments, **options)
