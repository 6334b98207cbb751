"""Move operators on channels-last tensors to the images that these are permutations of.

ConvNeXt and others permute images `(B, C, H, W)` to `(B, H, W, C)` for a layer norm and linear
layers, and back. Kernels store images with the channels last anyway: on images such a linear layer
is a 1x1 convolution, a layer norm one over channels, and the permutations disappear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import node_of, value_of
from ensemble.compiler.graph.graph_module import recompile
from ensemble.compiler.graph.rewriter import Rewriter, with_defaults
from ensemble.compiler.operators.layer_norm import LAYER_NORM

aten = torch.ops.aten

_ACTIVATIONS = (
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default),
    *(aten.tanh.default, aten.hardtanh.default, aten.hardsigmoid.default),
    *(aten.hardswish.default, aten.leaky_relu.default),
)
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def move_to_images(module: fx.GraphModule) -> None:
    """Rewrite, in a graph of `capture`, each operator on a channels-last tensor that has a rule.

    A channels-last tensor is `(B, H, W, C)`, or any other shape of the same elements in this order
    with C last. What other operators read of it is permuted back.
    """
    walk = _Walk(Rewriter(module.graph))
    for node in list(module.graph.nodes):
        walk.visit(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    recompile(module)


class _Walk:
    """In topological order. `images`: channels-last nodes, and the images that they permute."""

    def __init__(self, graph: Rewriter) -> None:
        self.graph = graph
        self.images: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op != "call_function" or node not in self.graph.dynamic:
            return
        rule = _RULES.get(node.target)
        made = rule(self, node) if rule else None
        if made is None:
            return
        with self.graph.before(node):
            permuted = self.graph.call(aten.permute.default, made, _TO_LAST, like=made)
            permuted.meta["val"] = value_of(made).permute(_TO_LAST)
            back = self.graph.reshaped(permuted, value_of(node).shape)
        self.images[permuted] = self.images[back] = made
        node.replace_all_uses_with(back)

    def images_of(self, node: object) -> fx.Node | None:
        return self.images.get(node) if isinstance(node, fx.Node) else None

    def made(
        self, node: fx.Node, target: Callable[..., Any], x: fx.Node, *rest: Any, channels: int
    ) -> fx.Node:
        """A new node before `node`: an operator on the images x, that gives so many channels."""
        with self.graph.before(node):
            result = self.graph.call(target, x, *rest, like=x)
        of = value_of(x)
        shape = len(of), channels, *of.shape[2:]
        result.meta["val"] = of.new_empty(shape, dtype=value_of(node).dtype)
        result.kwargs = node.kwargs
        return result


def _permute(walk: _Walk, node: fx.Node) -> None:
    x, dims = node.args
    order = [dim % len(value_of(node).shape) for dim in cast("Any", dims)]
    images = walk.images_of(x)
    if order == _TO_LAST and walk.graph.is_images(x):
        walk.images[node] = node_of(x)
    elif order == _TO_FIRST and _shape(images) == _shape(node):
        node.replace_all_uses_with(node_of(images))


def _shape(node: fx.Node | None) -> tuple[int, ...]:
    return () if node is None else tuple(value_of(node).shape)


def _reshape(walk: _Walk, node: fx.Node) -> None:
    images = walk.images_of(node.args[0])
    if images is not None and value_of(node).shape[-1:] == value_of(images).shape[1:2]:
        walk.images[node] = images


def _activation(walk: _Walk, node: fx.Node) -> fx.Node | None:
    x, *rest = node.args
    images = walk.images_of(x)
    if images is None:
        return None
    channels = value_of(images).shape[1]
    return walk.made(node, cast("Any", node.target), images, *rest, channels=channels)


def _layer_norm(walk: _Walk, node: fx.Node) -> fx.Node | None:
    x, shape, weight, bias, eps = node.args
    images = walk.images_of(x)
    if images is None or not walk.graph.is_constant(weight, bias):
        return None
    channels = value_of(images).shape[1]
    if list(cast("Any", shape)) != [channels] or not walk.graph.gives_one(node):
        return None
    return walk.made(node, LAYER_NORM, images, weight, bias, eps, channels=channels)


def _linear(walk: _Walk, node: fx.Node) -> fx.Node | None:
    """`(bias, x, weight)` or `(x, weight)`, weight `(C, K)`, as a 1x1 convolution."""
    bias, x, weight = node.args if len(node.args) == 3 else (None, *node.args)
    images = walk.images_of(x)
    if images is None or node.kwargs or not walk.graph.is_constant(bias, weight):
        return None
    count = value_of(weight).shape[1]
    if bias is not None and value_of(bias).shape != (count,):
        return None
    with walk.graph.before(node):
        filters = walk.graph.call(_filters, weight, like=None)
    filters.meta["val"] = _filters(value_of(weight))
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    return walk.made(
        *(node, aten.convolution.default, images, filters, bias, *options), channels=count
    )


def _filters(weight: Tensor) -> Tensor:
    """`(C, K)` -> `(K, C, 1, 1)`."""
    return weight.t()[..., None, None]


def _binary(walk: _Walk, node: fx.Node) -> fx.Node | None:
    """A sum or product of two channels-last tensors, or with a constant per channel."""
    if node.kwargs:
        return None
    operands: list[Any] = []
    found = [walk.images_of(operand) for operand in node.args]
    known = [images for images in found if images is not None]
    for operand, images in zip(node.args, found, strict=True):
        if images is not None and value_of(operand).shape == value_of(node).shape:
            operands.append(images)
        elif isinstance(operand, int | float):
            operands.append(operand)
        elif known and _is_per_channel(walk, operand, value_of(known[0]).shape[1]):
            with walk.graph.before(node):
                spread = walk.graph.call(aten.reshape.default, operand, [-1, 1, 1], like=None)
            spread.meta["val"] = value_of(operand).reshape(-1, 1, 1)
            operands.append(spread)
        else:
            return None
    if not known or len({value_of(images).shape for images in known}) > 1:
        return None
    with walk.graph.before(node):
        result = walk.graph.call(cast("Any", node.target), *operands, like=known[0])
    shape = value_of(known[0]).shape
    result.meta["val"] = value_of(known[0]).new_empty(shape, dtype=value_of(node).dtype)
    return result


def _is_per_channel(walk: _Walk, operand: object, channels: int) -> bool:
    known = value_of(operand)
    is_constant = isinstance(operand, fx.Node) and walk.graph.is_constant(operand)
    return is_constant and known.numel() == channels == known.shape[-1]


def _mean(walk: _Walk, node: fx.Node) -> fx.Node | None:
    """Over all pixels."""
    x, dims, keepdim, *_ = with_defaults(node)
    images = walk.images_of(x)
    if images is None or value_of(x).dim() != 4 or node.kwargs or keepdim:
        return None
    if sorted(dim % 4 for dim in dims) == [1, 2]:
        with walk.graph.before(node):
            mean = walk.graph.call(aten.mean.dim, images, [2, 3], like=node)
        walk.graph.drop(node, mean)
    return None


_Rule = Callable[[_Walk, fx.Node], fx.Node | None]
_RULES: dict[Any, _Rule] = {
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    **dict.fromkeys(_ACTIVATIONS, _activation),
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _linear,
    aten.mm.default: _linear,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.mean.dim: _mean,
}
