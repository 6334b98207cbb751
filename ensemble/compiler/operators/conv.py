"""Convolution and pooling as torch operators whose vmap rules choose a kernel for N models.

`conv2d`, `max_pool2d`, `average_pool2d`, `select`, `affine` and `group_norm` are operators of one
model. Under `torch.vmap` over stacked weights their rules take, on a CPU, the operators of
`operators.stacked`, on weights packed for the kernel that `choose` names; on CUDA batched matrix
products (`operators.matmul`); elsewhere torch's own rule: one grouped or one wide convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.operators import matmul
from ensemble.compiler.operators import stacked as stacks
from ensemble.compiler.planning.operation import Geometry, Kind


@custom_op("ensemble::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`relu(conv2d(x) + other)` of one model: x `(B, C, H, W)` -> `(B, K, OH, OW)`."""
    return plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


@conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, other: Any, *options: Any) -> Tensor:
    stride, padding, dilation, groups, relu = options
    return plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


@conv2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, stride, padding, dilation, groups, relu = arguments
    options = stride, padding, dilation
    x, weight, bias, other = _stacked_first(tensors, in_dims)
    is_stacked = [dim is not None for dim in in_dims[:4]]
    if _fits(x, weight, bias, is_stacked):
        geometry = stacks.conv_geometry(x, weight.shape[1], weight.shape[-2:], *options, groups)
        fused = other is None or _is_like_result(other, x, geometry, stacked=is_stacked[3])
        kind = stacks.kernel_for(x, geometry)
        if kind is not None:
            ending = (other, relu) if fused else (None, False)
            result = _by_kernel(kind, x, weight, bias, *ending, *options, groups)
            return (result if fused else _finish(result, other, is_stacked[3], relu)), 0
        if x.device.type == "cuda" and groups == 1 and all(spread == 1 for spread in dilation):
            result = matmul.conv2d(x, weight, stride, padding)
            result = result if bias is None else result + bias[:, None, :, None, None]
            return _finish(result, other, is_stacked[3], relu), 0
    result = _grouped_conv2d(info.batch_size, x, weight, bias, is_stacked, options, groups)
    return _finish(result, other, is_stacked[3], relu), 0


def _by_kernel(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    *options: Any,
) -> Tensor:
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    packed = stacks.pack_weight(weight, kind, options[-1])
    return stacks.packed_conv2d(x, packed, bias, other, kind, weight.shape[-2:], *options, relu)


def _finish(result: Tensor, other: Tensor | None, stacked: bool, relu: bool) -> Tensor:
    """`relu(result + other)` of each model, other broadcast as it would be for one model."""
    if other is not None:
        rank = max(result.dim() - 1, other.dim() - stacked)
        result = _with_rank(result, rank) + (_with_rank(other, rank) if stacked else other)
    return result.relu() if relu else result


def _with_rank(stack: Tensor, rank: int) -> Tensor:
    """`stack`, `(N, *shape)`, with sizes of 1 before `shape` until that has `rank` of them."""
    missing = rank - (stack.dim() - 1)
    return stack[(slice(None), *[None] * missing)]


@custom_op("ensemble::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`."""
    return plain_max_pool2d(x, kernel, stride, padding, ceil_mode)


def plain_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    sizes = list(kernel), list(stride), list(padding)
    return functional.max_pool2d(x, *sizes, ceil_mode=ceil_mode)


@max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return plain_max_pool2d(x, *options)


@max_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = _stacked_first([x], in_dims)
    if _can_pool(Kind.MAX_POOL, x, *options):
        return stacks.packed_max_pool2d(x, *options), 0
    return _pooled(plain_max_pool2d, x, *options), 0


def _can_pool(kind: Kind, x: Tensor, *sizes: Any) -> bool:
    """Is x `(N, B, C, H, W)`, and does the kernel take it?"""
    return x.dim() == 5 and stacks.can_run(kind, x, stacks.pool_geometry(x, *sizes))


def _pooled(pool: Callable[..., Tensor], x: Tensor, *options: Any) -> Tensor:
    """The images of N models by torch's own pooling of one model's."""
    if x.dim() == 4:  # each model's image is without a batch
        return pool(x, *options)
    # Models among the channels: so a wide or grouped convolution wrote them.
    pooled = pool(x.movedim(0, 1).flatten(1, 2), *options)
    return pooled.unflatten(1, (len(x), -1)).movedim(1, 0)


@custom_op("ensemble::average_pool2d", mutates_args=())
def average_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    zeros: bool,
) -> Tensor:
    """Average pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`.

    zeros: those around the image count as pixels.
    """
    return plain_average_pool2d(x, kernel, stride, padding, ceil_mode, zeros)


def plain_average_pool2d(x: Tensor, *options: Any) -> Tensor:
    kernel, stride, padding, ceil_mode, zeros = options
    return functional.avg_pool2d(x, list(kernel), list(stride), list(padding), ceil_mode, zeros)


@average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return plain_average_pool2d(x, *options)


@average_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = _stacked_first([x], in_dims)
    if _can_pool(Kind.AVERAGE_POOL, x, *options[:-1]):
        return stacks.packed_average_pool2d(x, *options), 0
    return _pooled(plain_average_pool2d, x, *options), 0


@custom_op("ensemble::select", mutates_args=())
def select(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """`x[:, channels][:, :, rows][..., columns]`, zeros for -1: `(B, C, H, W)`."""
    return plain_select(x, rows, columns, channels)


def plain_select(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """What `select` computes, by torch's own operators, of `(..., C, H, W)`."""
    result = x
    for dim, wanted in ((-3, channels), (-2, rows), (-1, columns)):
        indices = torch.tensor(wanted, device=x.device, dtype=torch.int64)
        shape = [-1, *[1] * (-1 - dim)]
        result = result.index_select(dim, indices.clamp(min=0))
        if min(wanted) < 0:
            result = result.masked_fill((indices < 0).view(shape), 0)
    return result


@select.register_fake
def _(x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-3], len(channels), len(rows), len(columns))


@select.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *taken: Any) -> Any:
    (x,) = _stacked_first([x], in_dims)
    if in_dims[0] is None:  # one image for all models
        return select(x, *taken), None
    if x.dim() == 5 and stacks.can_run(Kind.SELECT, x, stacks.select_geometry(x, *taken)):
        return stacks.packed_select(x, *taken), 0
    return plain_select(x, *taken), 0


@custom_op("ensemble::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for each channel: x `(B, C, H, W)`, scale and shift `(C,)`, of at
    least float32."""
    return _plain_affine(x, scale, shift)


def _plain_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    result = x.to(scale.dtype) * scale[..., :, None, None] + shift[..., :, None, None]
    return result.to(x.dtype)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@affine.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[Tensor, int]:
    x, scale, shift = _stacked_first(tensors, in_dims)
    is_stacked = [dim is not None for dim in in_dims]
    fits = is_stacked[0] and x.dim() == 5
    if fits and stacks.can_run(Kind.AFFINE, x, stacks.pointwise(x)):
        scale, shift = _of_all((scale, shift), is_stacked[1:], info.batch_size)
        return stacks.packed_affine(x, scale, shift), 0
    images = x if is_stacked[0] else x.expand(info.batch_size, *x.shape)
    factors, summands = (
        (t[:, None] if stacked else t)
        for t, stacked in zip((scale, shift), is_stacked[1:], strict=True)
    )
    return _plain_affine(images, factors, summands), 0


@custom_op("ensemble::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Group norm of one model: x `(B, C, H, W)`, weight and bias `(C,)`."""
    return functional.group_norm(x, groups, weight, bias, eps)


@group_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x)


@group_norm.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    *tensors, groups, eps = arguments
    x, weight, bias = _stacked_first(tensors, in_dims)
    count, is_stacked = info.batch_size, [dim is not None for dim in in_dims[:3]]
    images, weight, bias = _of_all((x, weight, bias), is_stacked, count)
    if images.dim() == 5 and stacks.can_run(Kind.GROUP_NORM, images, stacks.pointwise(images)):
        channels = images.shape[-3]
        weight = images.new_ones(count, channels) if weight is None else weight
        bias = images.new_zeros(count, channels) if bias is None else bias
        return stacks.packed_group_norm(images, weight, bias, groups, eps), 0
    flat = images.flatten(0, -4)
    result = functional.group_norm(flat, groups, None, None, eps).unflatten(0, images.shape[:-3])
    spread = (..., *[None] * (images.dim() - 4), slice(None), None, None)
    result = result if weight is None else result * weight[spread]
    return (result if bias is None else result + bias[spread]), 0


def plain_conv2d(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
) -> Tensor:
    """What `conv2d` computes, by torch's own operators."""
    result = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    result = result if other is None else result + other
    return result.relu() if relu else result


def _grouped_conv2d(
    num_models: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_stacked: Sequence[bool],
    options: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
) -> Tensor:
    """As torch's own rule has it: one wide convolution of a shared x, else one grouped by model.

    Result `(N, B, K, OH, OW)`, without B where x has none.
    """
    if x.dim() == (4 if is_stacked[0] else 3):
        batched = x.unsqueeze(-4)
        arguments = (weight, bias, is_stacked, options, groups)
        return _grouped_conv2d(num_models, batched, *arguments).squeeze(1)
    if not is_stacked[1] and (bias is None or not is_stacked[2]):  # all models have one filter
        result = functional.conv2d(x.flatten(0, -4), weight, bias, *options, groups)
        result = result.unflatten(0, x.shape[:-3])
        return result if is_stacked[0] else result.expand(num_models, *result.shape)
    weight = weight if is_stacked[1] else weight.expand(num_models, *weight.shape)
    if bias is not None:
        bias = (bias if is_stacked[2] else bias.expand(num_models, *bias.shape)).flatten()
    if not is_stacked[0] and groups > 1:
        x = x.expand(num_models, *x.shape)
    if x.dim() == 5:
        x, groups = x.movedim(0, 1).flatten(1, 2), num_models * groups
    result = functional.conv2d(x, weight.flatten(0, 1), bias, *options, groups)
    return result.unflatten(1, (num_models, -1)).movedim(1, 0)


def _stacked_first(tensors: Sequence[Any], in_dims: Sequence[int | None]) -> list[Any]:
    """The tensors of an operator, models first where there are several."""
    return [
        tensor.movedim(dim, 0) if dim else tensor
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


def _of_all(tensors: Sequence[Any], is_stacked: Sequence[bool], num_models: int) -> list[Any]:
    """Each tensor as a stack; one that all models share is held once."""
    return [
        tensor if stacked or tensor is None else tensor.expand(num_models, *tensor.shape)
        for tensor, stacked in zip(tensors, is_stacked, strict=True)
    ]


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, is_stacked: Sequence[bool]) -> bool:
    """A batch of images, and weights and bias of each model, all of one dtype?"""
    batched = x.dim() == (5 if is_stacked[0] else 4)
    stacked = is_stacked[1] and (bias is None or is_stacked[2])
    return batched and stacked and all(t is None or t.dtype == x.dtype for t in (weight, bias))


def _is_like_result(other: Tensor, x: Tensor, geometry: Geometry, *, stacked: bool) -> bool:
    """Can a kernel add it: of each model, with as many elements as the result?"""
    images, *size, channels = geometry.out_shape
    same_shape = other.shape[1:] == (images, channels, *size)
    return stacked and same_shape and other.dtype == x.dtype
