"""Convolution and max pooling as torch operators whose vmap rules choose a kernel for N models.

`conv2d` and `max_pool2d` are operators of one model. Under `torch.vmap` over stacked weights their
rules take the kernels of `ensemble.ops.kernels` on a CPU, on weights packed for the kernel that
`ensemble.ops.cost` names; on CUDA batched matrix products (`ensemble.ops.matmul`); elsewhere
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
from ensemble.ops.cost import choose
from ensemble.ops.operation import DIRECT, DIRECT_PAIRS, HEAD, MAX_POOL, Geometry, Operation

try:
    from ensemble.ops.simd import HAS_PAIRS, PANEL, WIDTH
except ImportError:  # without numba every convolution takes torch's own rule
    PANEL = WIDTH = 0
    HAS_PAIRS = False

# G of F(2x2, 3x3) and of F(4x4, 3x3): Lavin and Gray, arXiv 1509.09308.
_FILTER_TRANSFORMS = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}


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
def _(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    *tensors, stride, padding, dilation, groups, relu = arguments
    x, weight, bias, other = (
        tensor.movedim(dim, 0) if dim else tensor
        for tensor, dim in zip(tensors, in_dims, strict=False)
    )
    dims = tuple(None if dim is None else 0 for dim in in_dims[:4])
    kernel = list(weight.shape[-2:])
    geometry = _geometry(x, weight.shape[-4], kernel, stride, padding, dilation)
    stacked = dims[1] == 0 and (bias is None or dims[2] == 0) and groups == 1
    added = other is None or (dims[3] == 0 and other.shape[1:] == _shape(geometry))
    if stacked and added and _has_kernel(x, geometry):
        kind = choose(geometry, pairs=_has_pairs(x, geometry))
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        packed = pack_weight(weight, kind)
        return packed_conv2d(
            x, packed, bias, other, kind, kernel, stride, padding, dilation, relu
        ), 0
    if stacked and x.device.type == "cuda" and all(own == 1 for own in dilation):
        result = matmul.conv2d(x, weight, stride, padding)
        result = result if bias is None else result + bias[:, None, :, None, None]
    else:
        result = _grouped_conv2d(
            info.batch_size, x, weight, bias, dims, stride, padding, dilation, groups
        )
    if other is not None:
        result = result + other  # one for all models adds to each
    return result.relu() if relu else result, 0


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
def _(info: Any, in_dims: tuple, x: Tensor, *options: Any) -> tuple[Tensor, int]:
    x = x.movedim(in_dims[0], 0) if in_dims[0] else x
    if _is_ours(x) and x.shape[-3] % WIDTH == 0:
        return packed_max_pool2d(x, *options), 0
    # Models among the channels: so a wide or grouped convolution wrote them.
    pooled = functional.max_pool2d(x.movedim(0, 1).flatten(1, 2), *options)
    return pooled.unflatten(1, (len(x), -1)).movedim(1, 0), 0


@custom_op("ensemble::head", mutates_args=())
def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over all pixels, then a linear layer: x `(B, C, H, W)` -> `(B, K)`."""
    return functional.linear(x.mean((-2, -1)), weight, bias)


@head.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.mean((-2, -1)), weight, bias)


@head.register_vmap
def _(info: Any, in_dims: tuple, *tensors: Tensor | None) -> tuple[Tensor, int]:
    x, weight, bias = (
        tensor.movedim(dim, 0) if tensor is not None and dim else tensor
        for tensor, dim in zip(tensors, in_dims, strict=True)
    )
    assert x is not None
    assert weight is not None
    stacked = None not in in_dims[:2] and (bias is None or in_dims[2] is not None)
    if stacked and _is_ours(x) and x.shape[-3] % WIDTH == 0:
        out_channels = weight.shape[1]
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        missing = -out_channels % PANEL
        weight = functional.pad(weight, (0, 0, 0, missing))[..., None, None]
        packed = pack_weight(weight, DIRECT)
        return packed_head(x, packed, functional.pad(bias, (0, missing)), out_channels), 0
    result = x.mean((-2, -1)) @ weight.mT
    if bias is not None:
        result = result + (bias if in_dims[2] is None else bias.unsqueeze(-2))
    return result, 0


@custom_op("ensemble::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, kind: int) -> Tensor:
    """`(N, K, C, R, S)` -> the weights of N models as the kernel `kind` reads them.

    Direct: `(N, K / PANEL, R * S * C, PANEL)`, in pairs of bfloat16 `(N, K / PANEL, R * S * C / 2,
    PANEL, 2)`. Winograd: `(N, planes, K / PANEL, C, PANEL)`, transformed in float64.
    """
    packed = _empty_packed(weight, kind)
    for own, target in zip(weight, packed, strict=True):
        # A panel at a time: the largest part in float64 then stays small.
        for panel, rows in enumerate(own.split(PANEL)):
            factors = rows.permute(2, 3, 1, 0).flatten(0, 2)
            if kind == DIRECT:
                target[panel].copy_(factors)
            elif kind == DIRECT_PAIRS:
                even = functional.pad(factors, (0, 0, 0, len(factors) % 2))
                target[panel].copy_(even.unflatten(0, (-1, 2)).mT)
            else:
                g = torch.tensor(_FILTER_TRANSFORMS[kind], dtype=torch.float64)
                planes = g @ rows.double() @ g.mT
                target[:, panel].copy_(planes.permute(2, 3, 1, 0).flatten(0, 1))
    return packed


@pack_weight.register_fake
def _(weight: Tensor, kind: int) -> Tensor:
    return _empty_packed(weight, kind)


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
    relu: bool,
) -> Tensor:
    """`conv2d` of N models: x `(N, B, C, H, W)`, or `(B, C, H, W)` for all of them.

    weight is of `pack_weight`, bias `(N, K)`, other and the result `(N, B, K, OH, OW)`.
    """
    operation = _conv2d_operation(
        x, weight, bias, other, kind, kernel, stride, padding, dilation, relu
    )
    return _run(operation, [x] if other is None else [x, other], num_models=len(bias))


@packed_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, other: Any, kind: int, *options: Any) -> Tensor:
    kernel, stride, padding, dilation, _ = options
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
    kernel, stride, padding, dilation, relu = options
    geometry = _geometry(x, bias.shape[1], kernel, stride, padding, dilation)
    out_and_other = OUT, None if other is None else OTHER
    return Operation(kind, geometry, X, *out_and_other, weight, bias.float(), relu)


def _max_pool2d_operation(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Operation:
    return Operation(MAX_POOL, _geometry(x, x.shape[-3], kernel, stride, padding, (1, 1)), X, OUT)


def _head_operation(x: Tensor, weight: Tensor, bias: Tensor, out_channels: int) -> Operation:
    images, channels, height, width = x.shape[-4:]
    one = (1, 1)
    geometry = Geometry(
        images, channels, (height, width), out_channels, one, (height, width), one, (0, 0), one
    )
    return Operation(HEAD, geometry, X, OUT, None, weight, bias.float())


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
    dims: tuple,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As torch's own rule has it: one wide convolution of a shared x, else one grouped by model.

    Result `(N, B, K, OH, OW)`. dims: whether x, weight and bias are stacked, 0, or shared, None.
    """
    options = stride, padding, dilation
    if dims[1] is None and (bias is None or dims[2] is None):  # the weights are shared
        result = functional.conv2d(x.flatten(0, 1), weight, bias, *options, groups)
        return result.unflatten(0, x.shape[:2])
    weight = weight if dims[1] is not None else weight.expand(num_models, *weight.shape)
    if bias is not None:
        bias = (bias if dims[2] is not None else bias.expand(num_models, *bias.shape)).flatten()
    if dims[0] is None and groups > 1:
        x, dims = x.expand(num_models, *x.shape), (0, *dims[1:])
    if dims[0] is not None:
        x, groups = x.movedim(0, 1).flatten(1, 2), num_models * groups
    result = functional.conv2d(x, weight.flatten(0, 1), bias, *options, groups)
    return result.unflatten(1, (num_models, -1)).movedim(1, 0)


def _is_ours(x: Tensor) -> bool:
    """Are there kernels? Those for float32 do 16-bit dtypes too, unpacked at both ends."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return WIDTH > 0 and x.device.type == "cpu" and known


def _has_kernel(x: Tensor, geometry: Geometry) -> bool:
    if not _is_ours(x):
        return False
    gathered = geometry.channels % WIDTH == 0 or geometry.dilation[1] == 1
    return gathered and geometry.out_channels % PANEL == 0


def _has_pairs(x: Tensor, geometry: Geometry) -> bool:
    whole = geometry.channels % (2 * WIDTH) == 0 or geometry.channels % WIDTH != 0
    return HAS_PAIRS and x.dtype == torch.bfloat16 and whole


def _geometry(
    x: Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    images, channels, *size = x.shape[-4:]
    out_size = [
        (length + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for length, taps, step, pad, spread in zip(
            size, kernel, stride, padding, dilation, strict=True
        )
    ]
    pairs = (_pair(own) for own in (kernel, stride, padding, dilation))
    return Geometry(images, channels, _pair(size), out_channels, _pair(out_size), *pairs)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    y, x = values
    return int(y), int(x)


def _shape(geometry: Geometry) -> tuple[int, int, int, int]:
    return geometry.images, geometry.out_channels, *geometry.out_size


def _fake(x: Tensor, num_models: int, geometry: Geometry) -> Tensor:
    return x.new_empty(num_models, *geometry.out_shape).movedim(-1, -3)


def _empty_packed(weight: Tensor, kind: int) -> Tensor:
    num_models, out_channels, channels, height, width = weight.shape
    panels, depth = out_channels // PANEL, height * width * channels
    if kind == DIRECT_PAIRS:
        pairs = -(-depth // 2)
        return weight.new_empty(num_models, panels, pairs, PANEL, 2, dtype=torch.bfloat16)
    if kind == DIRECT:
        return weight.new_empty(num_models, panels, depth, PANEL, dtype=torch.float32)
    planes = (kind + 2) ** 2
    return weight.new_empty(num_models, planes, panels, channels, PANEL, dtype=torch.float32)
