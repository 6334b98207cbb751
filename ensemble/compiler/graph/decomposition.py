"""Decompose operators into ones that have kernels.

- A transposed convolution is one convolution at the input's resolution, with the filters of every
  pixel of a block of outputs, and a pixel shuffle: nothing multiplies the zeros between pixels.
- Bilinear upsampling reads pixels at coordinates that depend on sizes only.
- An instance norm, which torch computes as the batch norm of one image, is a group norm.
- A convolution of `(B, 1, C)` along the channels that a mean over all pixels left.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.graph import rewriter
from ensemble.compiler.graph.analysis import node_of, value_of
from ensemble.compiler.graph.rewriter import Rewriter, pair, with_defaults
from ensemble.compiler.operators.channel_conv import CHANNEL_CONV
from ensemble.compiler.operators.gather import GATHER
from ensemble.compiler.operators.pixel_shuffle import PIXEL_SHUFFLE
from ensemble.compiler.operators.resample import RESAMPLE

aten = torch.ops.aten


def decompose(module: fx.GraphModule) -> None:
    """Rewrite a graph of `capture`; nodes that no rule matches stay."""
    rewriter.apply(_REWRITES, module)


def _convolution(graph: Rewriter, node: fx.Node) -> None:
    x, weight, _, _, _, _, transposed, *_ = node.args
    dims = value_of(weight).dim()
    if transposed and dims == 4 and graph.is_images(x):
        _transposed_convolution(graph, node)
    elif dims == 3 and not transposed:
        _convolution_over_channels(graph, node)


# Transposed convolutions


@dataclass(frozen=True)
class _Phases:
    """One dimension of a transposed convolution as a convolution for each output of a block.

    taps: for each output of a block and each tap of the convolution, the tap of the transposed
    one, or None: zero. Outputs `stride * q + phase` read the convolution at `first + q`.
    """

    taps: Sequence[Sequence[int | None]]
    padding: int
    first: int


def _phases(
    *, taps: int, stride: int, padding: int, dilation: int, length: int, out_length: int
) -> _Phases:
    """Output `stride * q + phase` sums input `q + offset` times tap k, wherever
    `phase + padding - dilation * k = stride * offset`."""
    pairs = {
        (phase, (phase + padding - dilation * tap) // stride): tap
        for phase in range(stride)
        for tap in range(taps)
        if (phase + padding - dilation * tap) % stride == 0
    }
    offsets = [offset for _, offset in pairs]
    low, high = min(offsets), max(offsets)
    table = [[pairs.get((phase, at)) for at in range(low, high + 1)] for phase in range(stride)]
    blocks = -(-out_length // stride)
    pad = max(-low, blocks + high - length, 0)
    return _Phases(table, pad, low + pad)


def _transposed_convolution(graph: Rewriter, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, _, _, groups = cast("Any", node.args)
    if not graph.is_constant(weight, bias) or value_of(x).dtype != value_of(weight).dtype:
        return
    images, result = value_of(x), value_of(node)
    if not result.numel() or not images.numel():
        return
    ways = zip(
        value_of(weight).shape[2:],
        *map(pair, (stride, padding, dilation)),
        images.shape[2:],
        result.shape[2:],
        strict=True,
    )
    names = "taps", "stride", "padding", "dilation", "length", "out_length"
    rows, columns = (_phases(**dict(zip(names, way, strict=True))) for way in ways)
    block = [len(rows.taps), len(columns.taps)]
    options = [1, 1], [rows.padding, columns.padding], [1, 1], False, [0, 0], groups
    with graph.before(node):
        filters = graph.call(_by_phase, weight, groups, rows.taps, columns.taps, like=None)
        filters.meta["val"] = _by_phase(value_of(weight), groups, rows.taps, columns.taps)
        biases = None
        if bias is not None:
            biases = graph.call(_repeated, bias, groups, block[0] * block[1], like=None)
            biases.meta["val"] = _repeated(value_of(bias), groups, block[0] * block[1])
        blocks = graph.call(aten.convolution.default, x, filters, biases, *options, like=node)
        blocks.meta["val"] = _convolved(images, filters, options)
        if groups > 1:
            blocks = _phases_first(graph, blocks, groups, block[0] * block[1])
    first, size = [rows.first, columns.first], list(result.shape[2:])
    graph.replace(node, PIXEL_SHUFFLE, blocks, block, first, size)


def _convolved(images: Tensor, filters: fx.Node, options: Sequence[Any]) -> Tensor:
    """The fake value of a convolution."""
    stride, padding, dilation, *_, groups = options
    return functional.conv2d(images, value_of(filters), None, stride, padding, dilation, groups)


def _by_phase(
    weight: Tensor,
    groups: int,
    rows: Sequence[Sequence[int | None]],
    columns: Sequence[Sequence[int | None]],
) -> Tensor:
    """`(C, K / groups, R, S)` -> the filters of a convolution, `(K * Y * X, C / groups, ., .)`: in
    each group those of all phases, each phase with its channels."""
    spread = _taken(_taken(weight, rows, -2), columns, -1)
    by_phase = spread.unflatten(-2, (len(rows), -1)).unflatten(-1, (len(columns), -1))
    grouped = by_phase.unflatten(0, (groups, -1))  # (G, C, K, Y, R, X, S)
    return grouped.permute(0, 3, 5, 2, 1, 4, 6).flatten(0, 3).contiguous()


def _taken(weight: Tensor, phases: Sequence[Sequence[int | None]], dim: int) -> Tensor:
    """The taps of all phases along a dimension, zeros for None."""
    zero = torch.zeros_like(weight.narrow(dim, 0, 1))
    extended = torch.cat((weight, zero), dim)
    last = weight.shape[dim]
    indices = [last if tap is None else tap for taps in phases for tap in taps]
    return torch.cat([extended.narrow(dim, index, 1) for index in indices], dim)


def _repeated(bias: Tensor, groups: int, phases: int) -> Tensor:
    """A bias `(K,)` in the order of the filters of `_by_phase`."""
    return bias.reshape(groups, 1, -1).expand(-1, phases, -1).reshape(-1)


def _phases_first(graph: Rewriter, blocks: fx.Node, groups: int, phases: int) -> fx.Node:
    """From the order of filters by group, then phase, to that of a pixel shuffle."""
    known = value_of(blocks)
    order = (
        torch.arange(known.shape[1], device="cpu", dtype=torch.int64)
        .view(groups, phases, -1)
        .transpose(0, 1)
    )
    return _channels_taken(graph, blocks, order.flatten().tolist())


def _channels_taken(graph: Rewriter, x: fx.Node, channels: list[int]) -> fx.Node:
    rows, columns = (list(range(length)) for length in value_of(x).shape[2:])
    return graph.call(GATHER, x, rows, columns, channels, like=x)


def _pixel_shuffle(graph: Rewriter, node: fx.Node) -> None:
    """torch's own, whose channels are ordered by channel of the result, then pixel."""
    x, factor = cast("Any", node.args)
    known, result = value_of(x), value_of(node)
    if not graph.is_images(x) or not known.numel():
        return
    order = (
        torch.arange(known.shape[1], device="cpu", dtype=torch.int64).view(result.shape[1], -1).t()
    )
    with graph.before(node):
        ordered = _channels_taken(graph, x, order.flatten().tolist())
    block, size = [factor, factor], list(result.shape[2:])
    graph.replace(node, PIXEL_SHUFFLE, ordered, block, [0, 0], size)


# Upsampling


def _bilinear(graph: Rewriter, node: fx.Node) -> None:
    x, _, align_corners, *scales = with_defaults(node)
    images, result = value_of(x), value_of(node)
    if not graph.is_images(x) or not result.numel() or not images.numel():
        return
    rows, columns = (
        coordinates(length, out_length, bool(align_corners), scale)
        for length, out_length, scale in zip(
            images.shape[2:], result.shape[2:], scales, strict=True
        )
    )
    graph.replace(node, RESAMPLE, x, rows, columns)


def _bilinear_by_factors(graph: Rewriter, node: fx.Node) -> None:
    """The overload with a list of factors, or None for those of the sizes."""
    x, _, align_corners, factors = with_defaults(node)
    scales = factors or [None, None]
    with graph.before(node):
        arguments = x, list(value_of(node).shape[2:]), align_corners, *scales
        same = graph.call(aten.upsample_bilinear2d.default, *arguments, like=node)
    graph.drop(node, same)
    _bilinear(graph, same)


def coordinates(
    length: int, out_length: int, align_corners: bool, scale: float | None
) -> list[float]:
    """Where a line of pixels is read, in float32 as torch computes it (`UpSample.h`)."""
    one, half = np.float32(1), np.float32(0.5)
    places = np.arange(out_length, dtype=np.float32)
    if align_corners:
        step = np.float32(length - 1) / np.float32(out_length - 1) if out_length > 1 else 0 * one
        found = places * step
    else:
        step = np.float32(1 / scale) if scale else np.float32(length) / np.float32(out_length)
        found = np.maximum((places + half) * step - half, 0)
    result: list[float] = np.minimum(found, np.float32(length - 1)).tolist()
    return result


# Norms


def _batch_norm(graph: Rewriter, node: fx.Node) -> None:
    """Of images `(1, B * C, H, W)`, reshaped from `(B, C, H, W)`: by their own statistics, or by
    running ones that were repeated for each image."""
    x, *parameters, is_training, momentum, eps = cast("Any", node.args)
    flat = node_of(x)
    images = node_of(flat.args[0] if flat.target is aten.reshape.default else flat)
    if not graph.is_images(images) or (images is flat and not is_training):
        return
    known, merged = value_of(images), value_of(flat)
    count = known.shape[1]
    if merged.shape != (1, len(known) * count, *known.shape[2:]):
        return
    unrepeated = [_unrepeated(values, count) for values in parameters]
    if any(found is _NONE for found in unrepeated) or not graph.is_constant(*unrepeated):
        return
    if not graph.gives_one(node):
        return
    target: Any = node.target
    arguments: Any = (*unrepeated, False, momentum, eps)
    if is_training:
        target = aten.native_group_norm.default
        sizes = len(known), count, known.shape[2] * known.shape[3], count, eps
        arguments = (*unrepeated[:2], *sizes)
    with graph.before(node):
        norm = graph.call(target, images, *arguments, like=images)
        norm.meta["val"] = known, None, None
        first = graph.call(operator.getitem, norm, 0, like=images)
        back = graph.reshaped(first, merged.shape)
    graph.drop(node, back)


_NONE = object()


def _unrepeated(values: Any, count: int) -> Any:
    """A parameter `(C,)` that was repeated for each image; None stays."""
    if values is None:
        return None
    is_repeated = isinstance(values, fx.Node) and values.target is aten.repeat.default
    source = values.args[0] if is_repeated else values
    return source if value_of(source).shape == (count,) else _NONE


# Convolutions over channels


def _convolution_over_channels(graph: Rewriter, node: fx.Node) -> None:
    """Of `(B, 1, C)`, reshaped from one value per image and channel, that keeps C."""
    x, weight, bias, stride, padding, dilation, _, _, groups = cast("Any", node.args)
    known, filters = value_of(x), value_of(weight)
    source = node_of(x)
    one_filter = filters.shape[:2] == (1, 1) and filters.shape[2] % 2 == 1 and groups == 1
    keeps = [*stride, *dilation] == [1, 1] and 2 * padding[0] + 1 == filters.shape[2]
    if not (one_filter and keeps) or not graph.is_constant(weight, bias) or not known.numel():
        return
    if known.dim() != 3 or source.target is not aten.reshape.default:
        return
    before = node_of(source.args[0])
    if tuple(value_of(before).shape[:2]) != (len(known), known.shape[2]):
        return
    with graph.before(node):
        images = graph.reshaped(before, (len(known), known.shape[2], 1, 1))
        taps = graph.call(aten.reshape.default, weight, [-1], like=None)
        taps.meta["val"] = filters.reshape(-1)
        result = graph.call(CHANNEL_CONV, images, taps, bias, like=images)
        back = graph.reshaped(result, known.shape)
    graph.drop(node, back)


_REWRITES: dict[Any, Callable[[Rewriter, fx.Node], object]] = {
    aten.convolution.default: _convolution,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.upsample_bilinear2d.default: _bilinear,
    aten.upsample_bilinear2d.vec: _bilinear_by_factors,
    aten.native_batch_norm.default: _batch_norm,
}
