"""A step of a program: one kernel call for each of N models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Kind(IntEnum):
    """The kernel that runs a step. The number selects it in the compiled dispatch."""

    label: str  # for notes and error messages

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
    GATHER = 15, "gather"
    GROUP_NORM = 16, "group norm"
    LAYER_NORM = 17, "layer norm"
    CHANNEL_CONV = 18, "convolution over channels"
    PIXEL_SHUFFLE = 19, "pixel shuffle"
    RESAMPLE = 20, "bilinear"

    @property
    def fast_candidates(self) -> tuple[Kind, ...]:
        """For a fast kernel (fewer multiplications, larger rounding error): the fast kernels to
        try, in this order, before the direct one. Empty for every other kernel."""
        return _FAST_CANDIDATES.get(self, ())


_FAST_CANDIDATES = {
    Kind.WINOGRAD_2: (Kind.WINOGRAD_2,),
    Kind.WINOGRAD_4: (Kind.WINOGRAD_4, Kind.WINOGRAD_2),
    Kind.STRASSEN: (Kind.STRASSEN,),
}


class Activation(IntEnum):
    """An elementwise activation function: a separate step, or the epilogue of a kernel."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    SIGMOID = 3
    SILU = 4
    HARDSIGMOID = 5
    HARDSWISH = 6
    LEAKY_RELU = 7
    TANH = 8
    GELU = 9
    GELU_TANH = 10


@dataclass(frozen=True)
class Geometry:
    """The shapes of a convolution or pooling of one model, NHWC in memory. Pairs are (y, x).

    `group_channels`: input and output channels of a group, where padding channels belong to none.
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
    group_channels: tuple[int, int] | None = None

    @property
    def channels_per_group(self) -> tuple[int, int]:
        """Input and output channels of a group."""
        return self.group_channels or (
            self.channels // self.groups,
            self.out_channels // self.groups,
        )

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The output of one model in memory, (B, H, W, C)."""
        return self.images, *self.out_size, self.out_channels


@dataclass(frozen=True)
class Step:
    """`out = activation(relu(kind(x) + other))`; x, out and other are value ids of the program.

    weight and bias are stacked over the models. `option` and `scalar` are arguments of the kernel:
    the first output channel of a copy, whether average pooling counts the padding, the channels of
    a pixel shuffle; the eps of a norm, the negative slope of a leaky relu. The geometry's channels
    are padded to whole vectors; `channels` and `out_channels` count them without the padding (None:
    no padding).
    """

    kind: Kind
    geometry: Geometry
    x: int
    out: int
    other: int | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False
    activation: Activation = Activation.NONE
    option: int = 0
    scalar: float = 0.0
    channels: int | None = None
    out_channels: int | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.other is None else (self.x, self.other)

    @property
    def unpadded_channels(self) -> int:
        return self.channels or self.geometry.channels

    @property
    def unpadded_out_channels(self) -> int:
        return self.out_channels or self.geometry.out_channels
