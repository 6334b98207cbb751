"""The geometry of a step from the shapes and options of an operator."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ensemble.compiler.planning.step import Geometry
from ensemble.compiler.planning.vector_layout import in_vectors


def conv_geometry(
    x: Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Geometry:
    """Of a convolution of x, `(..., B, C, H, W)`."""
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


def pool_geometry(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
) -> Geometry:
    """Of a pooling of x, `(..., B, C, H, W)`."""
    plain = conv_geometry(x, x.shape[-3], kernel, stride, padding, (1, 1))
    if not ceil_mode:
        return plain
    # ceil_mode keeps a partial last window that begins within the image or its left padding.
    out_size = []
    for length, taps, step, pad in zip(plain.size, kernel, stride, padding, strict=True):
        count = -(-(length + 2 * pad - taps) // step) + 1
        out_size.append(count - ((count - 1) * step >= length + pad))
    return replace(plain, out_size=_y_and_x(out_size))


def same_size(x: Tensor, out_channels: int) -> Geometry:
    """Of an operator that keeps height and width."""
    return conv_geometry(x, out_channels, (1, 1), (1, 1), (0, 0), (1, 1))


def pointwise(x: Tensor) -> Geometry:
    """Of an elementwise operator on x, `(..., B, C, H, W)`, with channels padded to vectors."""
    return in_vectors(same_size(x, x.shape[-3]))


def _y_and_x(values: Sequence[int]) -> tuple[int, int]:
    y, x = values
    return int(y), int(x)
