"""A convolution of N models as an implicit GEMM: its sizes, and the layout of its packed weights.

Of every model and group, the product is `(rows, depth) @ (depth, columns)`: a row per output pixel,
a column per filter, and in the depth the taps of the filter times its input channels. The left
factor is never in memory: the kernel gathers it from the images (Chetlur et al., cuDNN: Efficient
Primitives for Deep Learning, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.planning.step import Activation, Geometry

MAX_BLOCK = 64  # depth that the kernel multiplies at once
MIN_BLOCK = 16  # what a tensor core takes
# Of fewer input channels per group, a block of the depth spans several taps.
FEW_CHANNELS, FEW_CHANNELS_BLOCK = 16, 32
COLUMN_ALIGNMENT = 8  # a row of packed weights is a multiple of 16 bytes, as TMA requires


class DotPrecision(StrEnum):
    """How a product of float32 numbers is computed; 16-bit products are exact in any case.

    TF32X3 splits each factor into two TF32 numbers and sums three products: as exact as float32 to
    a few units in the last place (Ootomo and Yokota, Recovering single precision accuracy from
    Tensor Cores, 2022).
    """

    IEEE = "ieee"
    TF32 = "tf32"
    TF32X3 = "tf32x3"


@dataclass(frozen=True)
class Shortcut:
    """A convolution with filters of one pixel whose result is added: input channels, and stride."""

    channels: int
    stride: tuple[int, int]


@dataclass(frozen=True)
class ConvProblem:
    """`activation(conv2d(x) + bias + other + conv2d(shortcut))` of N models.

    geometry: of one model's convolution, channels without padding.
    """

    num_models: int
    geometry: Geometry
    dtype: torch.dtype
    precision: DotPrecision = DotPrecision.IEEE
    activation: Activation = Activation.NONE
    has_other: bool = False
    shortcut: Shortcut | None = None

    @property
    def products(self) -> int:
        """Independent matrix products: one per model and group."""
        return self.num_models * self.geometry.groups

    @property
    def rows(self) -> int:
        height, width = self.geometry.out_size
        return self.geometry.images * height * width

    @property
    def columns(self) -> int:
        return self.geometry.channels_per_group[1]

    @property
    def has_few_channels(self) -> bool:
        return has_few_channels(self.geometry.channels_per_group[0])

    @property
    def depths(self) -> tuple[int, int]:
        """The padded depths of the convolution and of the shortcut."""
        height, width = self.geometry.kernel
        depth = padded_depth(self.geometry.channels_per_group[0], height * width)
        return depth, padded_depth(self.shortcut.channels, 1) if self.shortcut else 0

    @property
    def blocks(self) -> list[int]:
        """The possible depths of a block, the largest first: no block spans two taps, unless the
        are few channels, nor the convolution and the shortcut."""
        common = FEW_CHANNELS_BLOCK if self.has_few_channels else self._padded_channels
        if self.shortcut:
            common = gcd(common, self.depths[1])
        return [block for block in (64, 32, 16) if common % block == 0]

    @property
    def _padded_channels(self) -> int:
        return padded_channels(self.geometry.channels_per_group[0])


def has_few_channels(channels: int) -> bool:
    """Are there so few channels per group that a block of the depth spans several taps?"""
    return channels < FEW_CHANNELS


def padded_channels(channels: int) -> int:
    """Channels per group, padded to whole blocks: of `MAX_BLOCK` if that wastes at most an
    eighth."""
    for block in (MAX_BLOCK, MAX_BLOCK // 2):
        padded = -(-channels // block) * block
        if padded - channels <= padded // 8:
            return padded
    return -(-channels // MIN_BLOCK) * MIN_BLOCK


def padded_depth(channels: int, taps: int) -> int:
    """The depth of a product in memory."""
    if has_few_channels(channels):
        return -(-channels * taps // FEW_CHANNELS_BLOCK) * FEW_CHANNELS_BLOCK
    return taps * padded_channels(channels)


def padded_columns(columns: int) -> int:
    """The filters of a group in memory."""
    return -(-columns // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def packed_shape(
    shape: Sequence[int], groups: int, shortcut_channels: int
) -> tuple[int, int, int, int]:
    """`(N, groups, depth, columns)` of the packed weights `(N, K, C, R, S)`."""
    num_models, filters, channels, height, width = shape
    depth = padded_depth(channels, height * width)
    if shortcut_channels:
        depth += padded_depth(shortcut_channels, 1)
    return num_models, groups, depth, padded_columns(filters // groups)


def pack_weight(weight: Tensor, shortcut: Tensor | None, groups: int) -> Tensor:
    """The weights of N models in the layout of the kernel: `packed_shape`, zero-padded.

    Args:
        weight: `(N, K, C, R, S)`, C those of a group.
        shortcut: `(N, K, C, 1, 1)`: further rows of the depth. Only without groups.
        groups: of the convolution.
    """
    parts = [_depth_by_filters(weight, groups)]
    if shortcut is not None:
        parts.append(_depth_by_filters(shortcut, 1))
    matrix = torch.cat(parts, 2)
    missing = padded_columns(matrix.shape[-1]) - matrix.shape[-1]
    return functional.pad(matrix, (0, missing)).contiguous()


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor rounded to the nearest TF32 numbers, as `cvt.rna.tf32` of PTX does; NaN and
    infinities stay."""
    bits = tensor.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(tensor.isfinite(), rounded, tensor)


def _depth_by_filters(weight: Tensor, groups: int) -> Tensor:
    """`(N, K, C, R, S)` -> `(N, groups, depth, K / groups)`, taps first."""
    num_models, filters, channels, *taps = weight.shape
    by_taps = weight.view(num_models, groups, filters // groups, channels, -1).permute(
        0, 1, 4, 3, 2
    )
    if not has_few_channels(channels):
        by_taps = functional.pad(by_taps, (0, 0, 0, padded_channels(channels) - channels))
    matrix = by_taps.flatten(2, 3)
    depth = padded_depth(channels, taps[0] * taps[1])
    return functional.pad(matrix, (0, 0, 0, depth - matrix.shape[2]))
