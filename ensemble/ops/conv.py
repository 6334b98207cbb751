"""Convolution and max pooling as torch operators whose vmap rules choose a kernel for N models.

`conv2d` and `max_pool2d` are operators of one model. Under `torch.vmap` over stacked weights their
rules take the kernels of `ensemble.ops.kernels` on a CPU, on weights packed for the kernel that
`choose` names; on CUDA batched matrix products (`ensemble.ops.matmul`); elsewhere
torch's own rule: one grouped or one wide convolution. Packing is an operator of its own, so that a
traced graph can do it once, at build.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.ops import matmul
from ensemble.ops.operation import Geometry, Kind, Operation

try:
    from ensemble.ops.kernels import KERNELS, can_run, choose, empty_packed, pack
    from ensemble.ops.simd import PANEL
except ImportError:  # without numba every operator takes torch's own rule
    PANEL = 0

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
            result = _by_kernel(choose(geometry, kinds), x, weight, bias, *ending, *options, groups)
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
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Max pooling of one model: x `(B, C, H, W)` -> `(B, C, OH, OW)`."""
    return functional.max_pool2d(x, list(kernel), list(stride), list(padding))


@max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return functional.max_pool2d(x, *options)


@max_pool2d.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
    (x,) = _stacked_first([x], in_dims)
    if x.dim() == 4:  # each model's image is without a batch
        return functional.max_pool2d(x, *options), 0
    kernel, stride, padding = options
    geometry = _geometry(x, x.shape[-3], kernel, stride, padding, (1, 1))
    if _is_ours(x) and can_run(Kind.MAX_POOL, geometry):
        return packed_max_pool2d(x, *options), 0
    # Models among the channels: so a wide or grouped convolution wrote them.
    pooled = functional.max_pool2d(x.movedim(0, 1).flatten(1, 2), *options)
    return pooled.unflatten(1, (len(x), -1)).movedim(1, 0), 0


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
    fits = is_stacked[0] and _fits(x, weight, bias, is_stacked) and _is_ours(x)
    out_channels = weight.shape[-2]
    if fits and can_run(Kind.HEAD, _head_geometry(x, out_channels)):
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        missing = -out_channels % PANEL
        weight = functional.pad(weight, (0, 0, 0, missing))[..., None, None]
        packed = pack_weight(weight, Kind.DIRECT)
        return packed_head(x, packed, functional.pad(bias, (0, missing)), out_channels), 0
    result = x.mean((-2, -1)) @ weight.mT
    if bias is not None:
        result = result + (bias.unsqueeze(-2) if is_stacked[2] else bias)
    return result, 0


@custom_op("ensemble::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, kind: int) -> Tensor:
    """`(N, K, C, R, S)` -> the weights of N models as the kernel `kind` reads them."""
    return pack(weight, Kind(kind))


@pack_weight.register_fake
def _(weight: Tensor, kind: int) -> Tensor:
    return empty_packed(weight, Kind(kind))


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
    operation = _conv2d_operation(
        x, weight, bias, other, kind, kernel, stride, padding, dilation, groups, relu
    )
    return _run(operation, [x] if other is None else [x, other], num_models=len(bias))


@packed_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, other: Any, kind: int, *options: Any) -> Tensor:
    kernel, stride, padding, dilation, *_ = options
    return _fake(x, len(bias), _geometry(x, bias.shape[1], kernel, stride, padding, dilation))


@custom_op("ensemble::packed_max_pool2d", mutates_args=())
def packed_max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`max_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    return _run(_max_pool2d_operation(x, kernel, stride, padding), [x], num_models=len(x))


@packed_max_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    kernel, stride, padding = options
    return _fake(x, len(x), _geometry(x, x.shape[-3], kernel, stride, padding, (1, 1)))


@custom_op("ensemble::packed_head", mutates_args=())
def packed_head(x: Tensor, weight: Tensor, bias: Tensor, out_channels: int) -> Tensor:
    """`head` of N models: x `(N, B, C, H, W)` -> `(N, B, K)`; bias `(N, K)` filled up to panels."""
    return _run(_head_operation(x, weight, bias, out_channels), [x], num_models=len(x))


@packed_head.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, out_channels: int) -> Tensor:
    return x.new_empty(*x.shape[:2], out_channels)


X, OTHER, OUT = range(3)  # values of an operation by itself


def _conv2d_operation(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, kind: int, *options: Any
) -> Operation:
    *sizes, relu = options
    geometry = _geometry(x, bias.shape[1], *sizes)
    out_and_other = OUT, None if other is None else OTHER
    bias = bias.float().contiguous()
    return Operation(Kind(kind), geometry, X, *out_and_other, weight, bias, relu)


def _max_pool2d_operation(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Operation:
    return Operation(
        Kind.MAX_POOL, _geometry(x, x.shape[-3], kernel, stride, padding, (1, 1)), X, OUT
    )


def _head_operation(x: Tensor, weight: Tensor, bias: Tensor, out_channels: int) -> Operation:
    geometry, bias = _head_geometry(x, out_channels), bias.float().contiguous()
    return Operation(Kind.HEAD, geometry, X, OUT, None, weight, bias)


# The operators that a program can run, and how their arguments make an operation on X, OTHER and
# OUT; of x and other only the shape is asked.
OPERATIONS = {
    torch.ops.ensemble.packed_conv2d.default: _conv2d_operation,
    torch.ops.ensemble.packed_max_pool2d.default: _max_pool2d_operation,
    torch.ops.ensemble.packed_head.default: _head_operation,
}


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
    return program(*inputs)[0]


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


def _is_ours(x: Tensor) -> bool:
    """May there be kernels?"""
    return x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def _kinds(x: Tensor, geometry: Geometry) -> list[Kind]:
    """The kernels that can run a convolution of x; in bfloat16 rather than in float32."""
    if not _is_ours(x):
        return []
    bf16 = x.dtype == torch.bfloat16 and can_run(Kind.DIRECT_BF16, geometry)
    other = Kind.DIRECT if bf16 else Kind.DIRECT_BF16
    convolutions = (kind for kind, kernel in KERNELS.items() if kernel.cost and kind != other)
    return [kind for kind in convolutions if can_run(kind, geometry)]


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


def _head_geometry(x: Tensor, out_channels: int) -> Geometry:
    images, channels, *size = x.shape[-4:]
    one = (1, 1)
    return Geometry(
        images, channels, _y_and_x(size), out_channels, one, _y_and_x(size), one, (0, 0), one
    )


def _fake(x: Tensor, num_models: int, geometry: Geometry) -> Tensor:
    return x.new_empty(num_models, *geometry.out_shape).movedim(-1, -3)
