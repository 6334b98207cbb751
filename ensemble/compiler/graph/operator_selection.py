"""Operator selection: rewrite ATen operators by ours, whose batching rules select kernels.

One walk in topological order. Each convolution, pooling, batch norm, linear layer, sum or relu
becomes an operator of ours, or is fused into the one before it. A batch norm, and any other affine
function per channel by constants, folds into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.graph import rewriter
from ensemble.compiler.graph.analysis import is_images, node_of, value_of
from ensemble.compiler.graph.rewriter import Rewriter, pair, with_defaults
from ensemble.compiler.operators.affine import AFFINE
from ensemble.compiler.operators.conv2d import CONV2D
from ensemble.compiler.operators.group_norm import GROUP_NORM
from ensemble.compiler.operators.pixel_shuffle import PIXEL_SHUFFLE
from ensemble.compiler.operators.pooling import AVERAGE_POOL2D, MAX_POOL2D
from ensemble.compiler.planning.vector_layout import is_narrow

aten = torch.ops.aten

_ACTIVATIONS = (  # besides relu; each acts on its first argument
    *(aten.hardtanh.default, aten.sigmoid.default, aten.silu.default),
    *(aten.hardsigmoid.default, aten.hardswish.default, aten.leaky_relu.default),
)


def select_operators(module: fx.GraphModule) -> None:
    """Rewrite a graph of `capture`; nodes that no rule matches stay."""
    module.graph.eliminate_dead_code()  # unused results of norms
    rewriter.apply(_REWRITES, module)


def _convolution(graph: Rewriter, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if graph.is_images(x) and _dim(weight) == 4 and not transposed:
        sizes = map(pair, (stride, padding, dilation))
        graph.replace(node, CONV2D, x, weight, bias, None, *sizes, groups, False)


def _batch_norm(graph: Rewriter, node: fx.Node) -> None:
    """A batch norm by running statistics: a scale and a shift per channel."""
    x, weight, bias, mean, variance, *rest = node.args
    eps: Any = rest[-1]
    is_training = len(rest) == 3 and rest[0]
    has_statistics = isinstance(mean, fx.Node) and isinstance(variance, fx.Node)
    images = node_of(x) if graph.is_images(x) else _images_of(x)
    if (
        is_training
        or not has_statistics
        or images is None
        or value_of(images).shape[1] != len(value_of(mean))
    ):
        return
    if graph.is_constant(weight, bias, mean, variance) and graph.gives_one(node):
        if images is not x:
            node = _on_images(graph, node)
        with graph.before(node):
            scales = graph.call(_norm_scales, weight, variance, eps, like=None)
            shifts = graph.call(_norm_shifts, bias, mean, scales, like=None)
        _affine(graph, node, images, scales, shifts)


def _norm_scales(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    scales = (variance.double() + eps).rsqrt()
    return scales if weight is None else scales * weight.double()


def _norm_shifts(bias: Tensor | None, mean: Tensor, scales: Tensor) -> Tensor:
    shifts = -mean.double() * scales
    return shifts if bias is None else shifts + bias.double()


def _group_norm(graph: Rewriter, node: fx.Node) -> None:
    x, weight, bias, *_, groups, eps = node.args
    if graph.is_images(x) and graph.is_constant(weight, bias) and graph.gives_one(node):
        graph.replace(node, GROUP_NORM, x, weight, bias, groups, eps)


def _by_constants(scale: bool, inverse: bool = False) -> Callable[[Rewriter, fx.Node], None]:
    """The rule of `x * c` or `x + c`, in either order; inverse: of `x / c` or `x - c`."""

    def rewrite(graph: Rewriter, node: fx.Node) -> None:
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
        if not _is_per_channel(value_of(constant), known.shape[1]):
            return
        power, sign = (-1 if inverse and scale else 1), (-1 if inverse and not scale else 1)
        like = known.shape[1], known.device
        with graph.before(node):
            values = graph.call(_per_channel, constant, power, sign, *like, like=None)
            neutral = graph.call(_per_channel, 0 if scale else 1, 1, 1, *like, like=None)
        scales, shifts = (values, neutral) if scale else (neutral, values)
        # Dividing by a tensor that holds a 0 is valid for a sum, but not for each summand.
        divides = power < 0 and isinstance(constant, fx.Node)
        _affine(graph, node, node_of(x), scales, shifts, foldable=not divides)

    return rewrite


def _is_per_channel(constant: object, channels: int) -> bool:
    """Does it broadcast to images as a scalar or per channel?

    A scalar must be finite and not 0: a convolution cannot absorb others, or their inverse.
    """
    if not isinstance(constant, Tensor):
        return isinstance(constant, int | float) and constant != 0 and isfinite(constant)
    *images, own, height, width = (1, 1, 1, *constant.shape)[-4:]
    return constant.dim() <= 4 and images == [1] and own in (1, channels) and height == width == 1


def _per_channel(
    constant: Tensor | float, power: int, sign: int, channels: int, device: torch.device
) -> Tensor:
    """`sign * constant ** power` per channel: `(C,)` in float64."""
    if isinstance(constant, Tensor):
        values = constant.double().flatten()
    else:
        values = torch.full((1,), constant, dtype=torch.float64, device=device)
    return (sign * values**power).expand(channels)


def _affine(
    graph: Rewriter,
    node: fx.Node,
    x: fx.Node,
    scales: fx.Node,
    shifts: fx.Node,
    *,
    foldable: bool = True,
) -> None:
    """Replace a node by `x * scales + shifts`, `(C,)` in float64 each."""
    with graph.before(node):
        if foldable and _is_bare(x, CONV2D) and graph.is_constant(*x.args[1:3]):
            source, weight, bias, *rest = x.args
            scaled = graph.call(_scaled, weight, scales, like=None)
            scaled.meta["val"] = value_of(weight)
            shifted = graph.call(_shifted, bias, weight, scales, shifts, like=None)
            graph.replace(node, CONV2D, source, scaled, shifted, *rest)
            graph.graph.erase_node(x)
            return
        if x.target is PIXEL_SHUFFLE and len(x.users) == 1 and _is_bare(node_of(x.args[0]), CONV2D):
            _affine_before_shuffle(graph, node, x, scales, shifts, foldable=foldable)
            return
        wide = torch.promote_types(value_of(x).dtype, torch.float32)
        tensors = [graph.call(Tensor.to, tensor, wide, like=None) for tensor in (scales, shifts)]
        graph.replace(node, AFFINE, x, *tensors)


def _affine_before_shuffle(
    graph: Rewriter,
    node: fx.Node,
    shuffle: fx.Node,
    scales: fx.Node,
    shifts: fx.Node,
    *,
    foldable: bool,
) -> None:
    """`shuffle(x) * scales + shifts` as a shuffle of the same on x, which a convolution absorbs."""
    x, block, *rest = cast("Any", shuffle.args)
    with graph.before(node):
        repeated = [
            graph.call(Tensor.repeat, values, block[0] * block[1], like=None)
            for values in (scales, shifts)
        ]
        changed = graph.call(AFFINE, x, *repeated, like=x)
        again = graph.call(PIXEL_SHUFFLE, changed, block, *rest, like=node)
    graph.drop(node, again)
    graph.graph.erase_node(shuffle)
    _affine(graph, changed, x, *repeated, foldable=foldable)


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    # Not in float64: a layer of many models would take too much memory.
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * scales.to(wide)[:, None, None, None]).to(weight.dtype)


def _shifted(bias: Tensor | None, weight: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
    shifted = shifts if bias is None else bias.double() * scales + shifts
    return shifted.to(weight.dtype)


def _add(graph: Rewriter, node: fx.Node) -> None:
    """A sum of images of one shape: fused into the later convolution of the two (a residual)."""
    first, second = node.args
    known = [(v.shape, v.dtype) for v in map(value_of, (*node.args, node)) if isinstance(v, Tensor)]
    if len(known) < 3 or len(set(known)) > 1 or not all(map(graph.is_images, node.args)):
        _by_constants(scale=False)(graph, node)
        return
    if first is second or _merge(graph, node):
        return
    bare = [source for source in map(node_of, node.args) if _is_bare(source, CONV2D)]
    if not bare:
        return
    conv = max(bare)  # by topological order
    other = second if conv is first else first
    x, weight, bias, _, *rest = conv.args
    graph.replace(node, CONV2D, x, weight, bias, other, *rest)
    graph.graph.erase_node(conv)


def _merge(graph: Rewriter, node: fx.Node) -> bool:
    """The sum of two convolutions of one input as one, by the sum of their filters; also where one
    of the two is a scale and a shift per channel.

    So networks train that merge their branches for inference (Ding and others, RepVGG, arXiv
    2101.03697).
    """
    sources = sorted(map(node_of, node.args), reverse=True)  # by topological order
    convs = [source for source in sources if _is_bare(source, CONV2D)]
    convs = [conv for conv in convs if graph.is_constant(*conv.args[1:3])]
    convs.sort(key=lambda conv: value_of(conv.args[1]).shape[2:].numel(), reverse=True)
    if not convs:
        return False
    wide, *others = convs
    x, weight, bias, *rest = wide.args
    (other,) = others or (source for source in sources if source is not wide)
    if len(other.users) != 1 or other.args[0] is not x:
        return False
    if other.target is AFFINE and _keeps_pixels(wide):
        scales, shift = cast("Any", other.args)[1:]
        groups = rest[-2]
        with graph.before(node):
            added = graph.call(_on_diagonal, weight, scales, groups, like=None)
    elif others and _are_aligned(wide, other):
        added, shift = cast("Any", other.args)[1:3]
    else:
        return False
    with graph.before(node):
        filters = graph.call(_sum_of_filters, weight, added, like=None)
        filters.meta["val"] = value_of(weight)
        biases = (
            bias if shift is None else graph.call(_sum_of_biases, weight, shift, bias, like=None)
        )
    graph.replace(node, CONV2D, x, filters, biases, *rest)
    for source in (wide, other):
        graph.graph.erase_node(source)
    return True


def _keeps_pixels(conv: fx.Node) -> bool:
    """Has each output pixel an input pixel and channel, under the center of the filter?"""
    _, weight, _, _, stride, padding, dilation, *_ = cast("Any", conv.args)
    sizes, shape = value_of(weight).shape[2:], value_of(conv).shape
    centered = [2 * pad + 1 for pad in padding] == list(sizes)
    same = shape == value_of(conv.args[0]).shape
    return centered and same and {*stride, *dilation} == {1}


def _are_aligned(wide: fx.Node, other: fx.Node) -> bool:
    """Is the other's filter one of `wide` with zeros around it?"""
    sizes, other_sizes = (value_of(conv.args[1]).shape[2:] for conv in (wide, other))
    (stride, pads, dilation, groups), (own_stride, own_pads, own_dilation, own_groups) = (
        cast("Any", conv.args[4:8]) for conv in (wide, other)
    )
    borders = [
        size - own == 2 * (pad - own_pad) >= 0
        for size, own, pad, own_pad in zip(sizes, other_sizes, pads, own_pads, strict=True)
    ]
    same = (list(stride), groups) == (list(own_stride), own_groups)
    return same and all(borders) and {*dilation, *own_dilation} == {1}


def _sum_of_filters(weight: Tensor, other: Tensor) -> Tensor:
    """The other's filters are as large or smaller, and centered."""
    rows, columns = (
        (size - own) // 2 for size, own in zip(weight.shape[2:], other.shape[2:], strict=True)
    )
    return weight + functional.pad(other, (columns, columns, rows, rows))


def _sum_of_biases(weight: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
    return (bias if other is None else bias + other).to(weight.dtype)


def _on_diagonal(weight: Tensor, scales: Tensor, groups: int) -> Tensor:
    """1x1 filters that scale each channel: `(K, K / groups, 1, 1)`."""
    share = weight.shape[1]
    own = torch.eye(share, dtype=weight.dtype, device=weight.device).repeat(groups, 1)
    return (scales.to(weight.dtype)[:, None] * own)[..., None, None]


def _relu(graph: Rewriter, node: fx.Node) -> None:
    node = _on_images(graph, node)
    x = node_of(node.args[0])
    conv = x
    if x.target is PIXEL_SHUFFLE and len(x.users) == 1:  # relu before it is the same
        conv = node_of(x.args[0])
    if conv.target is CONV2D and len(conv.users) == 1 and not conv.args[-1]:
        conv.args = (*conv.args[:-1], True)
        graph.drop(node, x)


def _max_pool(graph: Rewriter, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil_mode = with_defaults(node)
    if graph.is_images(x) and set(pair(dilation)) == {1} and graph.gives_one(node):
        sizes = pair(kernel), pair(stride or kernel), pair(padding)
        graph.replace(node, MAX_POOL2D, x, *sizes, ceil_mode)


def _average_pool(graph: Rewriter, node: fx.Node) -> None:
    x, kernel, stride, padding, ceil_mode, zeros, divisor = with_defaults(node)
    if graph.is_images(x) and divisor is None:
        sizes = pair(kernel), pair(stride or kernel), pair(padding)
        graph.replace(node, AVERAGE_POOL2D, x, *sizes, ceil_mode, zeros)


def _adaptive_average_pool(graph: Rewriter, node: fx.Node) -> None:
    """To a size that divides the image's: average pooling by equal, disjoint windows."""
    x, size = node_of(node.args[0]), pair(node.args[1])
    if not graph.is_images(x):
        return
    whole = list(value_of(x).shape[-2:])
    if whole == size:
        graph.drop(node, x)
    elif all(length % count == 0 for length, count in zip(whole, size, strict=True)):
        kernel = [length // count for length, count in zip(whole, size, strict=True)]
        none = [0, 0]
        graph.replace(node, AVERAGE_POOL2D, x, kernel, kernel, none, False, False)


def _linear(graph: Rewriter, node: fx.Node) -> None:
    """A linear layer, `(bias, x, weight)` or `(x, weight)`, weight `(F, K)`, as a convolution.

    Its filters are as large as the images that were flattened to the features `(B, F)`; other
    features become images of one pixel.
    """
    bias, x, weight = node.args if len(node.args) == 3 else (None, *node.args)
    if not graph.is_constant(weight, bias) or x not in graph.dynamic:
        return
    if len(value_of(x)) != graph.batch:
        return
    if bias is not None and value_of(bias).shape != value_of(node).shape[1:]:
        return
    ones, none = [1, 1], [0, 0]
    with graph.before(node):
        images = _images_of(node_of(x))
        if images is None or is_narrow(value_of(images).shape[1], value_of(images).shape[-2:], 1):
            images = graph.reshaped(node_of(x), (*value_of(x).shape, 1, 1))
        sizes = list(value_of(images).shape[1:])
        filters = graph.call(_filters, weight, sizes, like=None)
        filters.meta["val"] = _filters(value_of(weight), sizes)
        result = graph.call(
            *(CONV2D, images, filters, bias, None, ones, none, ones, 1, False), like=node
        )
        result.meta["val"] = value_of(node)[..., None, None]
        flat = graph.reshaped(result, value_of(node).shape)
    graph.drop(node, flat)


def _filters(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """`(C * H * W, K)` -> `(K, C, H, W)`."""
    return weight.t().reshape(-1, *sizes)


def _images_of(x: object) -> fx.Node | None:
    """The images `(B, C, H, W)` that were flattened to features `(B, C * H * W)`."""
    if not isinstance(x, fx.Node) or x.target is not aten.reshape.default or _dim(x) != 2:
        return None
    images = node_of(x.args[0])
    return images if is_images(images) and len(value_of(images)) == len(value_of(x)) else None


def _on_images(graph: Rewriter, node: fx.Node) -> fx.Node:
    """Apply an elementwise operator to the images before they are reshaped, say to features."""
    reshaped, *rest = node.args
    if not isinstance(reshaped, fx.Node) or reshaped.target is not aten.reshape.default:
        return node
    images = node_of(reshaped.args[0])
    if not graph.is_images(images) or len(value_of(images)) != graph.batch:
        return node
    with graph.before(node):
        done = graph.call(cast("Any", node.target), images, *rest, like=images)
        back = graph.reshaped(done, value_of(node).shape)
    graph.drop(node, back)
    if not reshaped.users:
        graph.graph.erase_node(reshaped)
    return done


_Rewrite = Callable[[Rewriter, fx.Node], object]
_REWRITES: dict[Any, _Rewrite] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
    aten.mul.Tensor: _by_constants(scale=True),
    aten.div.Tensor: _by_constants(scale=True, inverse=True),
    aten.sub.Tensor: _by_constants(scale=False, inverse=True),
    aten.add.Tensor: _add,
    aten.relu.default: _relu,
    **dict.fromkeys(_ACTIVATIONS, _on_images),
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten.addmm.default: _linear,
    aten.mm.default: _linear,
}


def _is_bare(node: fx.Node, target: Callable[..., Any]) -> bool:
    """Is it a convolution of ours without an epilogue yet, and with one reader?"""
    if node.target is not target or len(node.users) != 1:
        return False
    _, _, _, other, *_, relu = node.args
    return other is None and not relu


def _dim(node: object) -> int | None:
    known = value_of(node)
    return known.dim() if isinstance(known, Tensor) else None
