"""Rewrite a graph of ATen operators by those of `operators.conv`, whose vmap rules choose kernels.

One walk from the input on: each node that is a convolution, pooling, batch norm, linear layer, sum
or relu becomes an operator of ours, or part of the one before it. A batch norm, and whatever else
multiplies channels by constants and adds constants to them, goes into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, fx

import ensemble.compiler.operators.conv  # noqa: F401  # registers torch.ops.ensemble
from ensemble.compiler.graph.functionalize import (
    is_images,
    node_of,
    reached,
    recompile,
    value_of,
)
from ensemble.compiler.planning.vector_layout import is_narrow

aten, ours = torch.ops.aten, torch.ops.ensemble

_CONV2D = ours.conv2d.default
_ACTIVATIONS = (  # beside relu, each on its first argument
    *(aten.hardtanh.default, aten.sigmoid.default, aten.silu.default),
    *(aten.hardsigmoid.default, aten.hardswish.default, aten.leaky_relu.default),
)


def with_operators(module: fx.GraphModule) -> None:
    """Rewrite a graph of `passes.aten.graph_of`; what the operators do not fit stays."""
    module.graph.eliminate_dead_code()  # results of a norm that nobody reads
    rewriting = _Rewriting(module.graph)
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None and node in rewriting.reached and not node.kwargs:
            rewrite(rewriting, node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    recompile(module)


class _Rewriting:
    """A graph, and which of its nodes depend on the input."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.reached = graph, reached(graph)
        self.batch = len(value_of(graph.find_nodes(op="placeholder")[-1]))

    def is_images(self, node: object) -> bool:
        """Is it `(B, C, H, W)`, and depends on the input?"""
        return node in self.reached and is_images(node)

    def is_constant(self, *nodes: object) -> bool:
        """Do they not depend on the input?"""
        return not any(node in self.reached for node in nodes)

    def before(self, node: fx.Node) -> AbstractContextManager[None]:
        """Within, new nodes stand before this one."""
        return self.graph.inserting_before(node)

    def call(self, target: Callable[..., Any], *arguments: Any, like: fx.Node | None) -> fx.Node:
        """A new node; like: which of the graph's it takes the place of, if any."""
        node = self.graph.call_function(target, arguments)
        if like is not None:
            node.meta["val"] = like.meta["val"]
            self.reached.add(node)
        return node

    def replace(self, node: fx.Node, target: Callable[..., Any], *arguments: Any) -> fx.Node:
        with self.before(node):
            made = self.call(target, *arguments, like=node)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return made

    def gives_one(self, node: fx.Node) -> bool:
        """Of several results, does nobody read another than the first? Then it is the node's."""
        users = list(node.users)
        if len(users) != 1 or users[0].args[1] != 0:
            return False
        node.meta["val"] = value_of(users[0])
        self.drop(users[0], node)
        return True

    def drop(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` stand for a node that gives the same."""
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)


def _convolution(graph: _Rewriting, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if graph.is_images(x) and _dim(weight) == 4 and not transposed:
        sizes = map(_two, (stride, padding, dilation))
        graph.replace(node, _CONV2D, x, weight, bias, None, *sizes, groups, False)


def _batch_norm(graph: _Rewriting, node: fx.Node) -> None:
    """In eval mode, by statistics that it holds: a factor and a summand for each channel."""
    x, weight, bias, mean, variance, *rest = node.args
    eps: Any = rest[-1]
    is_training = len(rest) == 3 and rest[0]
    held = isinstance(mean, fx.Node) and isinstance(variance, fx.Node)
    images = node_of(x) if graph.is_images(x) else _images_of(x)
    if (
        is_training
        or not held
        or images is None
        or value_of(images).shape[1] != len(value_of(mean))
    ):
        return
    if graph.is_constant(weight, bias, mean, variance) and graph.gives_one(node):
        if images is not x:
            node = _on_images(graph, node)
        with graph.before(node):
            factors = graph.call(_norm_factors, weight, variance, eps, like=None)
            summands = graph.call(_norm_summands, bias, mean, factors, like=None)
        _affine(graph, node, images, factors, summands)


def _norm_factors(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    factors = (variance.double() + eps).rsqrt()
    return factors if weight is None else factors * weight.double()


def _norm_summands(bias: Tensor | None, mean: Tensor, factors: Tensor) -> Tensor:
    summands = -mean.double() * factors
    return summands if bias is None else summands + bias.double()


def _group_norm(graph: _Rewriting, node: fx.Node) -> None:
    x, weight, bias, *_, groups, eps = node.args
    if graph.is_images(x) and graph.is_constant(weight, bias) and graph.gives_one(node):
        graph.replace(node, ours.group_norm.default, x, weight, bias, groups, eps)


def _by_constants(factor: bool, inverse: bool = False) -> Callable[[_Rewriting, fx.Node], None]:
    """Of `x * c` or `x + c`, either way round; inverse: of `x / c` or `x - c`."""

    def rewrite(graph: _Rewriting, node: fx.Node) -> None:
        x, constant = node.args
        if not inverse and graph.is_constant(x):
            x, constant = constant, x
        known, result = value_of(x), value_of(node)
        if not graph.is_images(x) or not graph.is_constant(constant):
            return
        if (known.shape, known.dtype) != (
            result.shape,
            result.dtype,
        ) or not known.is_floating_point():
            return
        if not _is_of_channels(value_of(constant), known.shape[1]):
            return
        power, sign = (-1 if inverse and factor else 1), (-1 if inverse and not factor else 1)
        like = known.shape[1], known.device
        with graph.before(node):
            values = graph.call(_of_channels, constant, power, sign, *like, like=None)
            neutral = graph.call(_of_channels, 0 if factor else 1, 1, 1, *like, like=None)
        factors, summands = (values, neutral) if factor else (neutral, values)
        # A tensor may hold a 0, by which a sum may be divided, but not what it sums up.
        divides = power < 0 and isinstance(constant, fx.Node)
        _affine(graph, node, node_of(x), factors, summands, foldable=not divides)

    return rewrite


def _is_of_channels(constant: object, channels: int) -> bool:
    """Does it broadcast to images as a number, or as one for each channel?

    A convolution cannot take a factor that is not finite, the inverse of 0 neither.
    """
    if not isinstance(constant, Tensor):
        return isinstance(constant, int | float) and constant != 0 and isfinite(constant)
    *images, own, height, width = (1, 1, 1, *constant.shape)[-4:]
    return constant.dim() <= 4 and images == [1] and own in (1, channels) and height == width == 1


def _of_channels(
    constant: Tensor | float, power: int, sign: int, channels: int, device: torch.device
) -> Tensor:
    """`sign * constant ** power` for each channel: `(C,)` in float64."""
    if isinstance(constant, Tensor):
        values = constant.double().flatten()
    else:
        values = torch.full((1,), constant, dtype=torch.float64, device=device)
    return (sign * values**power).expand(channels)


def _affine(
    graph: _Rewriting,
    node: fx.Node,
    x: fx.Node,
    factors: fx.Node,
    summands: fx.Node,
    *,
    foldable: bool = True,
) -> None:
    """Put `x * factors + summands`, `(C,)` in float64 each, in the place of a node."""
    with graph.before(node):
        if foldable and _is_bare(x, _CONV2D) and graph.is_constant(*x.args[1:3]):
            source, weight, bias, *rest = x.args
            scaled = graph.call(_scaled, weight, factors, like=None)
            shifted = graph.call(_shifted, bias, weight, factors, summands, like=None)
            graph.replace(node, _CONV2D, source, scaled, shifted, *rest)
            graph.graph.erase_node(x)
            return
        wide = torch.promote_types(value_of(x).dtype, torch.float32)
        tensors = [graph.call(Tensor.to, tensor, wide, like=None) for tensor in (factors, summands)]
        graph.replace(node, ours.affine.default, x, *tensors)


def _scaled(weight: Tensor, factors: Tensor) -> Tensor:
    # Not in float64: of a layer of many models that would be a lot of memory.
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * factors.to(wide)[:, None, None, None]).to(weight.dtype)


def _shifted(bias: Tensor | None, weight: Tensor, factors: Tensor, summands: Tensor) -> Tensor:
    shifted = summands if bias is None else bias.double() * factors + summands
    return shifted.to(weight.dtype)


def _add(graph: _Rewriting, node: fx.Node) -> None:
    """A sum of two images of one shape: into the later convolution of the two."""
    first, second = node.args
    known = [(v.shape, v.dtype) for v in map(value_of, (*node.args, node)) if isinstance(v, Tensor)]
    if len(known) < 3 or len(set(known)) > 1 or not all(map(graph.is_images, node.args)):
        _by_constants(factor=False)(graph, node)
        return
    bare = [source for source in map(node_of, node.args) if _is_bare(source, _CONV2D)]
    if not bare or first is second:
        return
    conv = max(bare)  # by their order in the graph
    other = second if conv is first else first
    x, weight, bias, _, *rest = conv.args
    graph.replace(node, _CONV2D, x, weight, bias, other, *rest)
    graph.graph.erase_node(conv)


def _relu(graph: _Rewriting, node: fx.Node) -> None:
    node = _on_images(graph, node)
    x = node_of(node.args[0])
    if x.target is _CONV2D and len(x.users) == 1 and not x.args[-1]:
        x.args = (*x.args[:-1], True)
        graph.drop(node, x)


def _max_pool(graph: _Rewriting, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil_mode = _filled(node)
    if graph.is_images(x) and set(_two(dilation)) == {1} and graph.gives_one(node):
        sizes = _two(kernel), _two(stride or kernel), _two(padding)
        graph.replace(node, ours.max_pool2d.default, x, *sizes, ceil_mode)


def _average_pool(graph: _Rewriting, node: fx.Node) -> None:
    x, kernel, stride, padding, ceil_mode, zeros, divisor = _filled(node)
    if graph.is_images(x) and divisor is None:
        sizes = _two(kernel), _two(stride or kernel), _two(padding)
        graph.replace(node, ours.average_pool2d.default, x, *sizes, ceil_mode, zeros)


def _adaptive_average_pool(graph: _Rewriting, node: fx.Node) -> None:
    """To a size that divides the image's: windows of one size, side by side."""
    x, size = node_of(node.args[0]), _two(node.args[1])
    if not graph.is_images(x):
        return
    whole = list(value_of(x).shape[-2:])
    if whole == size:
        graph.drop(node, x)
    elif all(length % count == 0 for length, count in zip(whole, size, strict=True)):
        kernel = [length // count for length, count in zip(whole, size, strict=True)]
        none = [0, 0]
        graph.replace(node, ours.average_pool2d.default, x, kernel, kernel, none, False, False)


def _linear(graph: _Rewriting, node: fx.Node) -> None:
    """`(bias, x, weight)` or `(x, weight)`, weight `(F, K)`: a convolution whose filters are as
    large as the images that the features `(B, F)` were, or of images of one pixel."""
    bias, x, weight = node.args if len(node.args) == 3 else (None, *node.args)
    if not graph.is_constant(weight, bias) or x not in graph.reached:
        return
    if len(value_of(x)) != graph.batch:
        return
    if bias is not None and value_of(bias).shape != value_of(node).shape[1:]:
        return
    ones, none = [1, 1], [0, 0]
    with graph.before(node):
        images = _images_of(node_of(x))
        if images is None or is_narrow(value_of(images).shape[1], value_of(images).shape[-2:], 1):
            images = _reshaped(graph, node_of(x), (*value_of(x).shape, 1, 1))
        filters = graph.call(_filters, weight, list(value_of(images).shape[1:]), like=None)
        result = graph.call(
            *(_CONV2D, images, filters, bias, None, ones, none, ones, 1, False), like=node
        )
        result.meta["val"] = value_of(node)[..., None, None]
        flat = _reshaped(graph, result, value_of(node).shape)
    graph.drop(node, flat)


def _filters(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """`(C * H * W, K)` -> `(K, C, H, W)`."""
    return weight.t().reshape(-1, *sizes)


def _reshaped(graph: _Rewriting, x: fx.Node, shape: Sequence[int]) -> fx.Node:
    result = graph.call(aten.reshape.default, x, list(shape), like=x)
    result.meta["val"] = value_of(x).reshape(shape)
    return result


def _images_of(x: object) -> fx.Node | None:
    """The images `(B, C, H, W)` that features `(B, C * H * W)` are."""
    if not isinstance(x, fx.Node) or x.target is not aten.reshape.default or _dim(x) != 2:
        return None
    images = node_of(x.args[0])
    return images if is_images(images) and len(value_of(images)) == len(value_of(x)) else None


def _on_images(graph: _Rewriting, node: fx.Node) -> fx.Node:
    """What is done to each number of features is done to those of the images that they are."""
    features, *rest = node.args
    images = _images_of(features)
    if images is None:
        return node
    with graph.before(node):
        done = graph.call(cast("Any", node.target), images, *rest, like=images)
        flat = _reshaped(graph, done, value_of(node).shape)
    graph.drop(node, flat)
    if not node_of(features).users:
        graph.graph.erase_node(node_of(features))
    return done


_Rewrite = Callable[[_Rewriting, fx.Node], object]
_REWRITES: dict[Any, _Rewrite] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
    aten.mul.Tensor: _by_constants(factor=True),
    aten.div.Tensor: _by_constants(factor=True, inverse=True),
    aten.sub.Tensor: _by_constants(factor=False, inverse=True),
    aten.add.Tensor: _add,
    aten.relu.default: _relu,
    **dict.fromkeys(_ACTIVATIONS, _on_images),
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten.addmm.default: _linear,
    aten.mm.default: _linear,
}


def _filled(node: fx.Node) -> list[Any]:
    """A node's arguments, with the defaults of those that are not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    known = node.target._schema.arguments[len(node.args) :]
    return [*node.args, *(argument.default_value for argument in known)]


def _two(size: Any) -> list[int]:
    """The sizes of y and x, of two or of one for both."""
    return [int(size[0]), int(size[-1])] if isinstance(size, Sequence) else [int(size)] * 2


def _is_bare(node: fx.Node, target: Callable[..., Any]) -> bool:
    """A convolution of ours that nothing was added to, and that only one node reads?"""
    if node.target is not target or len(node.users) != 1:
        return False
    _, _, _, other, *_, relu = node.args
    return other is None and not relu


def _dim(node: object) -> int | None:
    known = value_of(node)
    return known.dim() if isinstance(known, Tensor) else None
