"""Channels padded to whole vectors: kernels write vectors, so intermediate values hold them.

Padding channels are computed like the others, from weights that are zeros.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.planning.step import Geometry, Kind
from ensemble.machine import jit

try:
    jit.require()
    from numba.extending import register_jitable  # kernels call these functions too

    from ensemble.compiler.codegen.simd import WIDTH
except ImportError:  # without numba there are no kernels
    WIDTH = 1

    def register_jitable(function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[no-redef]
        return function


MAX_LANES = 8  # channels of a group that shares a vector with others


def padded_to_vectors(channels: int) -> int:
    """So many channels, padded to whole vectors."""
    return -(-channels // WIDTH) * WIDTH


def is_narrow(channels: int, kernel: tuple[int, int], groups: int) -> bool:
    """Does a convolution of few channels read images unpadded, in NCHW?"""
    return channels < WIDTH and groups == 1 and kernel != (1, 1)


def in_vectors(geometry: Geometry) -> Geometry:
    """The geometry with channels padded to whole vectors."""
    return replace(
        geometry,
        channels=padded_to_vectors(geometry.channels),
        out_channels=padded_to_vectors(geometry.out_channels),
        group_channels=geometry.channels_per_group if geometry.groups > 1 else None,
    )


def conv_in_vectors(geometry: Geometry) -> Geometry:
    """The same for a convolution, whose input channels stay unpadded where they are few."""
    padded = in_vectors(geometry)
    if is_narrow(geometry.channels, geometry.kernel, geometry.groups):
        return replace(padded, channels=geometry.channels)
    return padded


# Grouped convolutions. `inputs` and `outputs` are the channels of a group.


@register_jitable
def window(vector: int, inputs: int, outputs: int, planes: int) -> tuple[int, int]:
    """The input vectors that an output vector reads, first and end: those of its groups.

    planes: the number of input vectors.
    """
    first = vector * WIDTH // outputs * inputs // WIDTH
    end = ((vector * WIDTH + WIDTH - 1) // outputs + 1) * inputs
    return first, min((end + WIDTH - 1) // WIDTH, planes)


@register_jitable
def window_period(inputs: int, outputs: int) -> tuple[int, int]:
    """The fewest input vectors that no output vector reads together with others, and the number of
    output vectors that read them: windows repeat with this period."""
    # Both are powers of two, as WIDTH is.
    groups = max(WIDTH // gcd(inputs, WIDTH), WIDTH // gcd(outputs, WIDTH))
    return groups * inputs // WIDTH, groups * outputs // WIDTH


@register_jitable
def widest_window(inputs: int, outputs: int) -> int:
    """The most vectors of a `window`."""
    planes, readers = window_period(inputs, outputs)
    most = 0
    for vector in range(readers):
        first, end = window(vector, inputs, outputs, planes)
        most = max(most, end - first)
    return most


@register_jitable
def groups_fit_lanes(inputs: int, outputs: int) -> bool:
    """Does a vector hold several whole groups, with as many outputs as inputs?"""
    return inputs == outputs < WIDTH and WIDTH % inputs == 0 and inputs <= MAX_LANES


# Weights


def weight_in_vectors(weight: Tensor, kind: Kind, groups: int = 1) -> Tensor:
    """`(N, K, C, R, S)`, zero-padded as `conv_in_vectors` pads the channels.

    With groups C stays as it is if these fit the lanes of a vector. Else it becomes the channels of
    the widest `window`, with zeros for those of other groups.
    """
    _, out_channels, channels, *kernel = weight.shape
    rows, columns = kernel
    padding = padded_to_vectors(out_channels) - out_channels
    if kind == Kind.GROUPED:
        per_group = channels, out_channels // groups
        if not groups_fit_lanes(*per_group):
            weight = _in_windows(weight, *per_group)
        return functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, padding))
    narrow = is_narrow(channels, (rows, columns), 1)
    in_padding = 0 if narrow else padded_to_vectors(channels) - channels
    return functional.pad(weight, (0, 0, 0, 0, 0, in_padding, 0, padding))


def weight_shape(geometry: Geometry) -> tuple[int, int, int, int]:
    """`(K, C, R, S)` of one model's weight after `weight_in_vectors`."""
    channels = geometry.channels
    if geometry.groups > 1:
        per_group = geometry.channels_per_group
        is_lanewise = groups_fit_lanes(*per_group)
        channels = per_group[0] if is_lanewise else widest_window(*per_group) * WIDTH
    return geometry.out_channels, channels, *geometry.kernel


def weight_out_of_vectors(weight: Tensor, geometry: Geometry, unpadded: tuple[int, int]) -> Tensor:
    """The inverse of `weight_in_vectors`: `(N, K, C, R, S)`, C those of a group.

    unpadded: the input and output channels of the step.
    """
    channels, out_channels = unpadded
    if geometry.groups == 1:
        return weight[:, :out_channels, :channels]
    per_group = geometry.channels_per_group
    if groups_fit_lanes(*per_group):
        return weight[:, :out_channels]
    spans = _spans_in_windows(out_channels, *per_group)
    rows = [weight[:, begin:end, first : first + per_group[0]] for begin, end, first in spans]
    return torch.cat(rows, 1)


def _in_windows(weight: Tensor, inputs: int, outputs: int) -> Tensor:
    """Each filter at its inputs' place in the window of its output vector."""
    num_models, out_channels, _, *kernel = weight.shape
    channels = widest_window(inputs, outputs) * WIDTH
    placed = weight.new_zeros(num_models, out_channels, channels, *kernel)
    for begin, end, first in _spans_in_windows(out_channels, inputs, outputs):
        placed[:, begin:end, first : first + inputs] = weight[:, begin:end]
    return placed


def _spans_in_windows(
    out_channels: int, inputs: int, outputs: int
) -> Iterator[tuple[int, int, int]]:
    """For the outputs of one group in one vector: first, end, and where in the vector's window
    their inputs begin."""
    planes = padded_to_vectors(out_channels // outputs * inputs) // WIDTH
    for vector in range(-(-out_channels // WIDTH)):
        first_plane, _ = window(vector, inputs, outputs, planes)
        begin, end = vector * WIDTH, min((vector + 1) * WIDTH, out_channels)
        while begin < end:
            group = begin // outputs
            stop = min(end, (group + 1) * outputs)
            yield begin, stop, group * inputs - first_plane * WIDTH
            begin = stop
