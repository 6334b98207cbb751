"""Channels in whole vectors: what a kernel writes at a time, and so what a value between steps has.

The channels that fill up the last vector are computed like the others, of weights that are zeros.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.planning.operation import Geometry, Kind

try:
    from numba.extending import register_jitable  # kernels call the function too

    from ensemble.compiler.codegen.simd import WIDTH
except ImportError:  # without numba there are no kernels
    WIDTH = 1

    def register_jitable(function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[no-redef]
        return function


MOST_LANES = 8  # channels of a group that lies beside others: an input is moved to its lanes


def filled_up(channels: int) -> int:
    """So many channels in whole vectors."""
    return -(-channels // WIDTH) * WIDTH


def is_narrow(channels: int, kernel: tuple[int, int], groups: int) -> bool:
    """Does a convolution read images of few channels as they are, `(B, C, H, W)`?"""
    return channels < WIDTH and groups == 1 and kernel != (1, 1)


def in_vectors(geometry: Geometry) -> Geometry:
    """The geometry with channels up to whole vectors."""
    channels, out_channels = filled_up(geometry.channels), filled_up(geometry.out_channels)
    share = geometry.shares if geometry.groups > 1 else None
    return replace(geometry, channels=channels, out_channels=out_channels, share=share)


@register_jitable
def window(vector: int, share: int, out_share: int, planes: int) -> tuple[int, int]:
    """The vectors of inputs that a vector of outputs of a grouped convolution reads: first and end.

    They hold all inputs of the groups that its outputs are of; planes: the vectors that there are.
    """
    first = vector * WIDTH // out_share * share // WIDTH
    end = ((vector * WIDTH + WIDTH - 1) // out_share + 1) * share
    return first, min((end + WIDTH - 1) // WIDTH, planes)


@register_jitable
def set_of(share: int, out_share: int) -> tuple[int, int]:
    """The fewest whole vectors of inputs that whole vectors of outputs read alone: both numbers."""
    # Both are powers of two, as WIDTH is.
    groups = max(WIDTH // gcd(share, WIDTH), WIDTH // gcd(out_share, WIDTH))
    return groups * share // WIDTH, groups * out_share // WIDTH


@register_jitable
def widest(share: int, out_share: int) -> int:
    """The most vectors that a `window` has."""
    planes, readers = set_of(share, out_share)
    most = 0
    for vector in range(readers):
        first, end = window(vector, share, out_share, planes)
        most = max(most, end - first)
    return most


@register_jitable
def lies_side_by_side(share: int, out_share: int) -> bool:
    """Do groups lie side by side in a vector, with as many outputs as inputs?"""
    return share == out_share < WIDTH and WIDTH % share == 0 and share <= MOST_LANES


def conv_in_vectors(geometry: Geometry) -> Geometry:
    """The same of a convolution, which reads few channels as they are."""
    filled = in_vectors(geometry)
    if is_narrow(geometry.channels, geometry.kernel, geometry.groups):
        return replace(filled, channels=geometry.channels)
    return filled


def weight_in_vectors(weight: Tensor, kind: Kind, groups: int = 1) -> Tensor:
    """`(N, K, C, R, S)` with zeros where `conv_in_vectors` fills up.

    Of groups C is as it is, or, where they do not lie side by side in a vector, the channels of the
    widest `window`, with zeros for those of other groups.
    """
    _, out_channels, channels, *kernel = weight.shape
    rows, columns = kernel
    more = filled_up(out_channels) - out_channels
    if kind == Kind.GROUPED:
        share = channels, out_channels // groups
        if not lies_side_by_side(*share):
            weight = _in_windows(weight, *share)
        return functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, more))
    narrow = is_narrow(channels, (rows, columns), 1)
    inputs = 0 if narrow else filled_up(channels) - channels
    return functional.pad(weight, (0, 0, 0, 0, 0, inputs, 0, more))


def weight_shape(geometry: Geometry) -> tuple[int, int, int, int]:
    """`(K, C, R, S)` of one model's weight after `weight_in_vectors`, for such a geometry."""
    channels = geometry.channels
    if geometry.groups > 1:
        share = geometry.shares
        channels = share[0] if lies_side_by_side(*share) else widest(*share) * WIDTH
    return geometry.out_channels, channels, *geometry.kernel


def weight_out_of_vectors(weight: Tensor, geometry: Geometry, real: tuple[int, int]) -> Tensor:
    """The inverse of `weight_in_vectors`: `(N, K, C, R, S)`, C those of a group.

    real: inputs and outputs of the step that mean something.
    """
    channels, out_channels = real
    if geometry.groups == 1:
        return weight[:, :out_channels, :channels]
    share = geometry.shares
    if lies_side_by_side(*share):
        return weight[:, :out_channels]
    groups = _places_in_windows(out_channels, *share)
    rows = [weight[:, begin:end, first : first + share[0]] for begin, end, first in groups]
    return torch.cat(rows, 1)


def _in_windows(weight: Tensor, share: int, out_share: int) -> Tensor:
    """Each filter at its inputs' place in the window of its vector."""
    num_models, out_channels, _, *kernel = weight.shape
    placed = weight.new_zeros(num_models, out_channels, widest(share, out_share) * WIDTH, *kernel)
    for begin, end, first in _places_in_windows(out_channels, share, out_share):
        placed[:, begin:end, first : first + share] = weight[:, begin:end]
    return placed


def _places_in_windows(
    out_channels: int, share: int, out_share: int
) -> Iterator[tuple[int, int, int]]:
    """Outputs of one group in one vector, first and end, and where in the vector's window their
    inputs begin."""
    planes = filled_up(out_channels // out_share * share) // WIDTH
    for vector in range(-(-out_channels // WIDTH)):
        first_plane, _ = window(vector, share, out_share, planes)
        begin, end = vector * WIDTH, min((vector + 1) * WIDTH, out_channels)
        while begin < end:
            group = begin // out_share
            stop = min(end, (group + 1) * out_share)
            yield begin, stop, group * share - first_plane * WIDTH
            begin = stop
