"""One step of a program, for all models: what it computes, on which values, with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Kinds. Those of Winograd are the side of their output tiles.
DIRECT, MAX_POOL, WINOGRAD_2, HEAD, WINOGRAD_4, DIRECT_PAIRS = range(6)
NAMES = {
    DIRECT: "direct",
    MAX_POOL: "max pooling",
    WINOGRAD_2: "Winograd F(2x2)",
    HEAD: "mean and linear",
    WINOGRAD_4: "Winograd F(4x4)",
    DIRECT_PAIRS: "direct in bfloat16",
}


@dataclass(frozen=True)
class Geometry:
    """A convolution or pooling of one model, channels-last in memory. Pairs are (y, x)."""

    images: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The result of one model as it lies in memory, (B, H, W, C)."""
        return self.images, *self.out_size, self.out_channels


@dataclass(frozen=True)
class Operation:
    """`out = relu(kind(x) + other)`; x, out and other are numbers of values.

    weight and bias hold those of all models, one after another.
    """

    kind: int
    geometry: Geometry
    x: int
    out: int
    other: int | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.other is None else (self.x, self.other)
