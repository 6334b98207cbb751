"""One step of a program, for all models: what it computes, on which values, with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Kind(IntEnum):
    """Which kernel runs a step; its number stands in a program's table."""

    label: str  # in words

    def __new__(cls, number: int, label: str = "") -> Kind:
        kind = int.__new__(cls, number)
        kind._value_, kind.label = number, label
        return kind

    DIRECT = 1, "direct"
    DIRECT_BF16 = 2, "direct in bfloat16"
    WINOGRAD_2 = 3, "Winograd F(2x2)"
    WINOGRAD_4 = 4, "Winograd F(4x4)"
    MAX_POOL = 5, "max pooling"
    GROUPED = 7, "grouped"
    STRASSEN = 8, "Strassen"
    AVERAGE_POOL = 9, "average pooling"
    ACTIVATION = 10, "activation"
    SUM = 11, "sum"
    SCALE = 12, "scale"
    AFFINE = 13, "batch norm"
    COPY = 14, "copy"
    SELECT = 15, "selection"
    GROUP_NORM = 16, "group norm"

    @property
    def attempts(self) -> tuple[Kind, ...]:
        """Kernels that save multiplications, whose results are less exact than a direct product's:
        this one and those to try after it; of other kernels none."""
        return _ATTEMPTS.get(self, ())


_ATTEMPTS = {
    Kind.WINOGRAD_2: (Kind.WINOGRAD_2,),
    Kind.WINOGRAD_4: (Kind.WINOGRAD_4, Kind.WINOGRAD_2),
    Kind.STRASSEN: (Kind.STRASSEN,),
}


class Function(IntEnum):
    """What an activation computes."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    SIGMOID = 3
    SILU = 4
    HARDSIGMOID = 5
    HARDSWISH = 6
    LEAKY_RELU = 7


@dataclass(frozen=True)
class Geometry:
    """A convolution or pooling of one model, channels-last in memory. Two numbers are (y, x).

    `share`: inputs and outputs of a group, where channels that fill up vectors belong to none.
    """

    images: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    share: tuple[int, int] | None = None

    @property
    def shares(self) -> tuple[int, int]:
        """Channels in and out of a group."""
        return self.share or (self.channels // self.groups, self.out_channels // self.groups)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The result of one model as it lies in memory, (B, H, W, C)."""
        return self.images, *self.out_size, self.out_channels


@dataclass(frozen=True)
class Operation:
    """`out = function(relu(kind(x) + other))`; x, out and other are numbers of values.

    weight and bias hold those of all models, one after another. `option` is for the kernel alone:
    the channel that a copy begins at, whether the mean of a window counts zeros around the image.
    So is `number`: the eps of a norm, the slope of a leaky relu, where negative.
    Of the geometry's channels the first ones mean something, the
    others fill up vectors: `channels` and `out_channels` (None: all).
    """

    kind: Kind
    geometry: Geometry
    x: int
    out: int
    other: int | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False
    function: Function = Function.NONE
    option: int = 0
    number: float = 0.0
    channels: int | None = None
    out_channels: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.other is None else (self.x, self.other)
