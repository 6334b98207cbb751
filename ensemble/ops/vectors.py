"""Channels in whole vectors: what a kernel writes at a time, and so what a value between steps has.

The channels that fill up the last vector are computed like the others, of weights that are zeros.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from ensemble.ops.operation import Geometry, Kind

try:
    from ensemble.ops.simd import WIDTH
except ImportError:  # without numba there are no kernels
    WIDTH = 1


def filled_up(channels: int) -> int:
    """So many channels in whole vectors."""
    return -(-channels // WIDTH) * WIDTH


def is_narrow(channels: int, kernel: tuple[int, int], groups: int) -> bool:
    """Does a convolution read images of few channels as they are, `(B, C, H, W)`?"""
    return channels < WIDTH and groups == 1 and kernel != (1, 1)


def fits_vectors(geometry: Geometry) -> bool:
    """Can `in_vectors` fill up its groups: with as many outputs as inputs, or full as they are?"""
    groups = geometry.groups
    if groups == 1:
        return True
    share, channels = geometry.channels // groups, filled_up(geometry.channels)
    if geometry.channels == geometry.out_channels:
        return channels % share == 0
    return channels == geometry.channels and filled_up(geometry.out_channels) == (
        geometry.out_channels
    )


def in_vectors(geometry: Geometry) -> Geometry:
    """The geometry with channels, and groups, up to whole vectors."""
    channels, out_channels = filled_up(geometry.channels), filled_up(geometry.out_channels)
    share = geometry.channels // geometry.groups
    groups = 1 if geometry.groups == 1 else channels // share
    return replace(geometry, channels=channels, out_channels=out_channels, groups=groups)


def conv_in_vectors(geometry: Geometry) -> Geometry:
    """The same of a convolution, which reads few channels as they are."""
    filled = in_vectors(geometry)
    if is_narrow(geometry.channels, geometry.kernel, geometry.groups):
        return replace(filled, channels=geometry.channels)
    return filled


def weight_in_vectors(weight: Tensor, kind: Kind) -> Tensor:
    """`(N, K, C, R, S)` with zeros where `conv_in_vectors` fills up; of groups C is as it is."""
    _, out_channels, channels, *kernel = weight.shape
    rows, columns = kernel
    narrow = kind == Kind.GROUPED or is_narrow(channels, (rows, columns), 1)
    more = 0 if narrow else filled_up(channels) - channels
    return functional.pad(weight, (0, 0, 0, 0, 0, more, 0, filled_up(out_channels) - out_channels))
