"""Operators of N models at once, run by kernels: those that the vmap rules of `conv` choose.

Each is a program of one step; `lower` makes programs of many of the same steps. Packing weights is
an operator of its own, so that a traced graph can do it once, at build.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional

from ensemble.compiler.planning.operation import Geometry, Kind, Operation
from ensemble.compiler.planning.vector_layout import conv_in_vectors, in_vectors, weight_in_vectors

try:
    from ensemble.compiler import kernels
except ImportError:  # without numba every operator takes torch's own rule
    kernels = None  # type: ignore[assignment]

# Those for float32 do 16-bit dtypes too, unpacked at both ends.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@custom_op("ensemble::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, kind: int, groups: int = 1) -> Tensor:
    """`(N, K, C, R, S)` -> the weights of N models as the kernel `kind` reads them."""
    return kernels.pack(weight_in_vectors(weight, Kind(kind), groups), Kind(kind))


@pack_weight.register_fake
def _(weight: Tensor, kind: int, groups: int = 1) -> Tensor:
    filled = weight_in_vectors(weight, Kind(kind), groups)
    return kernels.empty_packed(filled, Kind(kind))


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
    return _fake(x, len(bias), conv_geometry(x, bias.shape[1], kernel, stride, padding, dilation))


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
    return _fake(x, len(x), pool_geometry(x, *options))


@custom_op("ensemble::packed_average_pool2d", mutates_args=())
def packed_average_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    zeros: bool,
) -> Tensor:
    """`average_pool2d` of N models: x `(N, B, C, H, W)` -> `(N, B, C, OH, OW)`."""
    operation = average_pool2d_operation(x, kernel, stride, padding, ceil_mode, zeros)
    return _run(operation, [x], num_models=len(x))


@packed_average_pool2d.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _fake(x, len(x), pool_geometry(x, *options[:-1]))


@custom_op("ensemble::packed_select", mutates_args=())
def packed_select(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Tensor:
    """`select` of N models: x `(N, B, C, H, W)` -> `(N, B, channels, rows, columns)`."""
    return _run(select_operation(x, rows, columns, channels), [x], num_models=len(x))


@packed_select.register_fake
def _(x: Tensor, *taken: Any) -> Tensor:
    return _fake(x, len(x), select_geometry(x, *taken))


@custom_op("ensemble::packed_affine", mutates_args=())
def packed_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`affine` of N models: x `(N, B, C, H, W)`, scale and shift `(N, C)`."""
    return _run(affine_operation(x, scale, shift), [x], num_models=len(x))


@packed_affine.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _fake(x, len(x), _same_size(x, x.shape[-3]))


@custom_op("ensemble::packed_group_norm", mutates_args=())
def packed_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`group_norm` of N models: x `(N, B, C, H, W)`, weight and bias `(N, C)`."""
    return _run(group_norm_operation(x, weight, bias, groups, eps), [x], num_models=len(x))


@packed_group_norm.register_fake
def _(x: Tensor, *options: Any) -> Tensor:
    return _fake(x, len(x), _same_size(x, x.shape[-3]))


X, OTHER, OUT = range(3)  # values of an operation by itself


def conv2d_operation(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, kind: int, *options: Any
) -> Operation:
    """`packed_conv2d` as a step from X and OTHER to OUT; of x and other only the shape is asked."""
    *sizes, relu = options
    plain = conv_geometry(x, bias.shape[1], *sizes)
    geometry = conv_in_vectors(plain)
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
    return _in_vectors(Operation(Kind.MAX_POOL, pool_geometry(x, *options), X, OUT))


def average_pool2d_operation(x: Tensor, *options: Any) -> Operation:
    """`packed_average_pool2d` as a step."""
    *sizes, zeros = options
    geometry = pool_geometry(x, *sizes)
    return _in_vectors(Operation(Kind.AVERAGE_POOL, geometry, X, OUT, option=int(zeros)))


def select_operation(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Operation:
    """`packed_select` as a step."""
    geometry = select_geometry(x, rows, columns, channels)
    table = kernels.select_table(rows, columns, channels)
    step = _in_vectors(Operation(Kind.SELECT, geometry, X, OUT))
    return replace(step, weight=table.expand(len(x), -1))  # all models read the one table


def affine_operation(x: Tensor, scale: Tensor, shift: Tensor) -> Operation:
    """`packed_affine` as a step."""
    geometry = pointwise(x)
    factors, summands = (_filled(tensor, geometry.channels) for tensor in (scale, shift))
    channels = x.shape[-3]
    step = Operation(Kind.AFFINE, geometry, X, OUT, None, factors, summands)
    return replace(step, channels=channels, out_channels=channels)


def group_norm_operation(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Operation:
    """`packed_group_norm` as a step."""
    share = x.shape[-3] // groups
    step = affine_operation(x, weight, bias)
    geometry = replace(step.geometry, share=(share, share))
    return replace(step, kind=Kind.GROUP_NORM, geometry=geometry, number=eps)


def _in_vectors(step: Operation) -> Operation:
    """The step with its channels filled up to whole vectors."""
    geometry = step.geometry
    return replace(
        step,
        geometry=in_vectors(geometry),
        channels=geometry.channels,
        out_channels=geometry.out_channels,
    )


def _filled(values: Tensor, channels: int) -> Tensor:
    """`(N, C)` in float32 with zeros up to so many channels."""
    return functional.pad(values.float(), (0, channels - values.shape[1])).contiguous()


def _run(operation: Operation, inputs: Sequence[Tensor], *, num_models: int) -> Tensor:
    from ensemble.compiler.runtime.program import Program

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
    # Without what fills up vectors, as `_fake` says.
    return result.movedim(-3, -1).contiguous().movedim(-1, -3)


def is_ours(x: Tensor) -> bool:
    """May there be kernels?"""
    return kernels is not None and x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES


def can_run(kind: Kind, x: Tensor, geometry: Geometry) -> bool:
    """Does the kernel take images like x, and such a step, filled up to whole vectors?"""
    return is_ours(x) and kernels.can_run(kind, in_vectors(geometry))


def kernel_for(x: Tensor, geometry: Geometry) -> Kind | None:
    """The kernel with the least estimated time for a convolution of x, in bfloat16 rather than in
    float32; None where no kernel can run it."""
    if not is_ours(x):
        return None
    grouped, geometry = geometry.groups > 1, conv_in_vectors(geometry)
    bf16 = x.dtype == torch.bfloat16 and kernels.can_run(Kind.DIRECT_BF16, geometry)
    other = Kind.DIRECT if bf16 else Kind.DIRECT_BF16
    convolutions = (kind for kind, kernel in kernels.KERNELS.items() if kernel.cost)
    fitting = (kind for kind in convolutions if (kind == Kind.GROUPED) == grouped and kind != other)
    able = [kind for kind in fitting if kernels.can_run(kind, geometry)]
    return kernels.choose(geometry, able) if able else None


def conv_geometry(
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


def pool_geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Geometry:
    plain = conv_geometry(x, x.shape[-3], kernel, stride, padding, (1, 1))
    if not ceil_mode:
        return plain
    # A last window that is not full counts too, if it begins in the image or in what is before it.
    out_size = []
    for length, taps, step, pad in zip(plain.size, kernel, stride, padding, strict=True):
        count = -(-(length + 2 * pad - taps) // step) + 1
        out_size.append(count - ((count - 1) * step >= length + pad))
    return replace(plain, out_size=_y_and_x(out_size))


def pointwise(x: Tensor) -> Geometry:
    """What computes each number of x, `(..., B, C, H, W)`, by itself, in whole vectors."""
    return in_vectors(_same_size(x, x.shape[-3]))


def _same_size(x: Tensor, out_channels: int) -> Geometry:
    return conv_geometry(x, out_channels, (1, 1), (1, 1), (0, 0), (1, 1))


def select_geometry(
    x: Tensor, rows: Sequence[int], columns: Sequence[int], channels: Sequence[int]
) -> Geometry:
    return replace(_same_size(x, len(channels)), out_size=(len(rows), len(columns)))


def _fake(x: Tensor, num_models: int, geometry: Geometry) -> Tensor:
    return x.new_empty(num_models, *geometry.out_shape).movedim(-1, -3)
