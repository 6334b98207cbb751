"""Convolution and pooling as torch operators whose vmap rules choose a kernel for N models.

`conv2d`, `max_pool2d`, `average_pool2d`, `affine` and `head` are operators of one model. Under
`torch.vmap` over stacked weights their rules take the kernels of `ensemble.ops.kernels` on a CPU,
on weights packed for the kernel that `choose` names; on CUDA batched matrix products
(`ensemble.ops.matmul`); elsewhere
torch's own rule: one grouped or one wide convolution. Packing is an operator of its own, so that a
traced graph can do it once, at build.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.ops import matmul
from ensemble.ops.operation import Geometry, Kind, Operation
from ensemble.ops.panels import conv_in_panels, filled_up, fits_panels, in_panels, weight_in_panels

try:
    from ensemble.ops.kernels import KERNELS, can_run, choose, empty_packed, pack
except ImportError:  # without numba every operator takes torch's own rule

    def can_run(kind: Kind, geometry: Geometry) -> bool:
        return False


# Those for float32 do 16-bit dtypes too, unpacked at both ends.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        geometry = _geometry(x, weight.shape[1], weight.shape[-2:], *options, groups)
        fused = other is None or _is_like_result(other, x, geometry, stacked=is_stacked[3])
        kinds = _kinds(x, geometry)
        if kinds:
            ending = (other, relu) if fused else (None, False)
            kind = choose(conv_in_panels(geometry), kinds)
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
    packed = pack_weight(weight, kind)
    return packed_conv2d(x, packed, bias, other, kind, weight.shape[-2:], *options, relu)


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
    return _plain_max_pool2d(x, kernel, stride, padding, ceil_mode)


def _plain_max_pool2d(
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
    return _plain_max_pool2d(x, *options)


@max_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = _stacked_first([x], in_dims)
    if _can_pool(Kind.MAX_POOL, x, *options):
        return packed_max_pool2d(x, *options), 0
    return _pooled(_plain_max_pool2d, x, *options), 0


def _can_pool(kind: Kind, x: Tensor, *sizes: Any) -> bool:
    """Is x `(N, B, C, H, W)`, and does the kernel take it?"""
    return x.dim() == 5 and is_ours(x) and can_run(kind, in_panels(_pool_geometry(x, *sizes)))


def _pooled(pool: Callable[..., Tensor], x: Tensor, *options: Any) -> Tensor:
    """The images of N models by torch's own pooling of one model's."""
    if x.dim() == 4:  # each model's image is without a batch
        return pool(x, *options)
    # Models among the channels: so a wide or grouped convolution wrote them.
    pooled = pool(x.movedim(0, 1).flatten(1, 2), *options)
    return pooled.unflatten(1, (len(x), -1)).movedim(1, 0)


@custom_op("ensemble::average_pool2d", mutates_args=())
def average_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], zeros: bool
) -> Tensor:
    """Average pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`.

    zeros: those around the image count as pixels.
    """
    return _plain_average_pool2d(x, kernel, stride, padding, zeros)


def _plain_average_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], zeros: bool
) -> Tensor:
    sizes = list(kernel), list(stride), list(padding)
    return functional.avg_pool2d(x, *sizes, count_include_pad=zeros)


@average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _plain_average_pool2d(x, *options)


@average_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = _stacked_first([x], in_dims)
    if _can_pool(Kind.AVERAGE_POOL, x, *options[:3]):
        return packed_average_pool2d(x, *options), 0
    return _pooled(_plain_average_pool2d, x, *options), 0


@custom_op("ensemble::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for each channel: x `(B, C, H, W)`, scale and shift `(C,)` in float32."""
    return _plain_affine(x, scale, shift)


def _plain_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    result = x.float() * scale[..., :, None, None] + shift[..., :, None, None]
    return result.to(x.dtype)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@affine.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[Tensor, int]:
    x, scale, shift = _stacked_first(tensors, in_dims)
    is_stacked = [dim is not None for dim in in_dims]
    if all(is_stacked) and x.dim() == 5 and is_ours(x) and can_run(Kind.AFFINE, pointwise(x)):
        return packed_affine(x, scale, shift), 0
    images = x if is_stacked[0] else x.expand(info.batch_size, *x.shape)
    factors, summands = (
        (t[:, None] if stacked else t)
        for t, stacked in zip((scale, shift), is_stacked[1:], strict=True)
    )
    return _plain_affine(images, factors, summands), 0


@custom_op("ensemble::head", mutates_args=())
def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over all pixels, then a linear layer: x `(B, C, H, W)` -> `(B, K)`."""
    return plain_head(x, weight, bias)


@head.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return plain_head(x, weight, bias)


@head.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Any) -> tuple[Tensor, int]:
    x, weight, bias = _stacked_first(tensors, in_dims)
    is_stacked = [dim is not None for dim in in_dims]
    fits = is_stacked[0] and _fits(x, weight, bias, is_stacked) and is_ours(x)
    if fits and can_run(Kind.HEAD, _head_geometry(x, weight.shape[-2])):
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        packed = pack_weight(weight[..., None, None], Kind.DIRECT)
        return packed_head(x, packed, bias), 0
    result = x.mean((-2, -1)) @ weight.mT
    if bias is not None:
        result = result + (bias.unsqueeze(-2) if is_stacked[2] else bias)
    return result, 0


@custom_op("ensemble::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, kind: int) -> Tensor:
    """`(N, K, C, R, S)` -> the weights of N models as the kernel `kind` reads them, in panels."""
    return pack(weight_in_panels(weight, Kind(kind)), Kind(kind))


@pack_weight.register_fake
def _(weight: Tensor, kind: int) -> Tensor:
    return empty_packed(weight_in_panels(weight, Kind(kind)), Kind(kind))


@custom_op("ensemble::packed_conv2d", mutates_args=())
def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor | None,
    kind: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`conv2d` of N models: x `(N, B, C, H, W)`, or `(B, C, H, W)` for all of them.

    weight is of `pack_weight`, bias `(N, K)`, other and the result `(N, B, K, OH, OW)`.
    """
    operation = conv2d_operation(
        x, weight, bias, other, kind, kernel, stride, padding, dilation, groups, relu
    )
    return _run(operation, [x] if other is None else [x, other], num_models=len(bias))


@packed_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, other: Any, kind: int, *options: Any) -> Tensor:
    kernel, stride, padding, dilation, *_ = options
    return _fake(x, len(bias), _geometry(x, bias.shape[1], kernel, stride, padding, dilation))


@custom_op("ensemble::packed_max_pool2d", mutates_args=())
def packed_max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    operation = max_pool2d_operation(x, kernel, stride, padding, ceil_mode)
    return _run(operation, [x], num_models=len(x))


@packed_max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _fake(x, len(x), _pool_geometry(x, *options))


@custom_op("ensemble::packed_average_pool2d", mutates_args=())
def packed_average_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], zeros: bool
) -> Tensor:
    """`average_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    operation = average_pool2d_operation(x, kernel, stride, padding, zeros)
    return _run(operation, [x], num_models=len(x))


@packed_average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _fake(x, len(x), _pool_geometry(x, *options[:3]))


@custom_op("ensemble::packed_affine", mutates_args=())
def packed_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`affine` of N models: x `(N, B, C, H, W)`, scale and shift `(N, C)`."""
    return _run(affine_operation(x, scale, shift), [x], num_models=len(x))


@packed_affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _fake(x, len(x), _geometry(x, x.shape[-3], (1, 1), (1, 1), (0, 0), (1, 1)))


@custom_op("ensemble::packed_head", mutates_args=())
def packed_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`head` of N models: x `(N, B, C, H, W)` -> `(N, B, K)`; bias `(N, K)`."""
    return _run(head_operation(x, weight, bias), [x], num_models=len(x))


@packed_head.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], bias.shape[1])


X, OTHER, OUT = range(3)  # values of an operation by itself


def conv2d_operation(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, kind: int, *options: Any
) -> Operation:
    """`packed_conv2d` as a step from X and OTHER to OUT; of x and other only the shape is asked."""
    *sizes, relu = options
    plain = _geometry(x, bias.shape[1], *sizes)
    geometry = conv_in_panels(plain)
    return Operation(
        Kind(kind),
        geometry,
        X,
        OUT,
        None if other is None else OTHER,
        weight,
        _filled(bias, geometry.out_channels),
        relu,
        channels=plain.channels,
        out_channels=plain.out_channels,
    )


def max_pool2d_operation(x: Tensor, *options: Any) -> Operation:
    """`packed_max_pool2d` as a step."""
    return _in_panels(Operation(Kind.MAX_POOL, _pool_geometry(x, *options), X, OUT))


def average_pool2d_operation(x: Tensor, *options: Any) -> Operation:
    """`packed_average_pool2d` as a step."""
    *sizes, zeros = options
    geometry = _pool_geometry(x, *sizes)
    return _in_panels(Operation(Kind.AVERAGE_POOL, geometry, X, OUT, option=int(zeros)))


def affine_operation(x: Tensor, scale: Tensor, shift: Tensor) -> Operation:
    """`packed_affine` as a step."""
    geometry = pointwise(x)
    factors, summands = (_filled(tensor, geometry.channels) for tensor in (scale, shift))
    channels = x.shape[-3]
    step = Operation(Kind.AFFINE, geometry, X, OUT, None, factors, summands)
    return replace(step, channels=channels, out_channels=channels)


def head_operation(x: Tensor, weight: Tensor, bias: Tensor) -> Operation:
    """`packed_head` as a step."""
    geometry = _head_geometry(x, bias.shape[1])
    bias = _filled(bias, filled_up(bias.shape[1]))
    return Operation(Kind.HEAD, geometry, X, OUT, None, weight, bias, channels=x.shape[-3])


def _in_panels(step: Operation) -> Operation:
    """The step with its channels filled up to whole panels."""
    geometry = step.geometry
    return replace(
        step,
        geometry=in_panels(geometry),
        channels=geometry.channels,
        out_channels=geometry.out_channels,
    )


def _filled(values: Tensor, channels: int) -> Tensor:
    """`(N, C)` in float32 with zeros up to so many channels."""
    return functional.pad(values.float(), (0, channels - values.shape[1])).contiguous()


def _run(operation: Operation, inputs: Sequence[Tensor], *, num_models: int) -> Tensor:
    from ensemble.ops.program import Program

    values = (X, OTHER)[: len(inputs)]
    program = Program(
        [operation],
        inputs=values,
        outputs=[OUT],
        num_models=num_models,
        threads=1,
        dtype=inputs[0].dtype,
    )
    (result,) = program(*inputs)
    if result.dim() == 3:  # of a head
        return result
    # Without what fills up panels, as `_fake` says.
    return result.movedim(-3, -1).contiguous().movedim(-1, -3)


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


def plain_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `head` computes, by torch's own operators."""
    return functional.linear(x.mean((-2, -1)), weight, bias)


def _stacked_first(tensors: Sequence[Any], in_dims: Sequence[int | None]) -> list[Any]:
    """The tensors of an operator, models first where there are several."""
    return [
        tensor.movedim(dim, 0) if dim else tensor
        for tensor, dim in zip(tensors, in_dims, strict=False)
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


def is_ours(x: Tensor) -> bool:
    """May there be kernels?"""
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def _kinds(x: Tensor, geometry: Geometry) -> list[Kind]:
    """The kernels that can run a convolution of x; in bfloat16 rather than in float32."""
    if not is_ours(x) or not fits_panels(geometry):
        return []
    grouped, geometry = geometry.groups > 1, conv_in_panels(geometry)
    bf16 = x.dtype == torch.bfloat16 and can_run(Kind.DIRECT_BF16, geometry)
    other = Kind.DIRECT if bf16 else Kind.DIRECT_BF16
    convolutions = (kind for kind, kernel in KERNELS.items() if kernel.cost and kind != other)
    fitting = (kind for kind in convolutions if (kind == Kind.GROUPED) == grouped)
    return [kind for kind in fitting if can_run(kind, geometry)]


def _geometry(
    x: Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Geometry:
    images, channels, *size = x.shape[-4:]
    out_size = [
        (length + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for length, taps, step, pad, spread in zip(
            size, kernel, stride, padding, dilation, strict=True
        )
    ]
    return Geometry(
        images,
        channels,
        _y_and_x(size),
        out_channels,
        _y_and_x(out_size),
        _y_and_x(kernel),
        _y_and_x(stride),
        _y_and_x(padding),
        _y_and_x(dilation),
        groups,
    )


def _y_and_x(values: Sequence[int]) -> tuple[int, int]:
    y, x = values
    return int(y), int(x)


def _pool_geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Geometry:
    plain = _geometry(x, x.shape[-3], kernel, stride, padding, (1, 1))
    if not ceil_mode:
        return plain
    # A last window that is not full counts too, if it begins in the image or in what is before it.
    out_size = []
    for length, taps, step, pad in zip(plain.size, kernel, stride, padding, strict=True):
        count = -(-(length + 2 * pad - taps) // step) + 1
        out_size.append(count - ((count - 1) * step >= length + pad))
    return replace(plain, out_size=_y_and_x(out_size))


def pointwise(x: Tensor) -> Geometry:
    """What computes each number of x, `(..., B, C, H, W)`, by itself, in panels."""
    return in_panels(_geometry(x, x.shape[-3], (1, 1), (1, 1), (0, 0), (1, 1)))


def _head_geometry(x: Tensor, out_channels: int) -> Geometry:
    images, channels, *size = x.shape[-4:]
    one, whole = (1, 1), _y_and_x(size)
    return Geometry(images, filled_up(channels), whole, out_channels, one, whole, one, (0, 0), one)


def _fake(x: Tensor, num_models: int, geometry: Geometry) -> Tensor:
    return x.new_empty(num_models, *geometry.out_shape).movedim(-1, -3)
