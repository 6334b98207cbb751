"""A small U-Net (Ronneberger and others, arXiv 1505.04597), to test segmentation ensembles with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = 8, 16, 32
CLASSES = 4


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with a norm and an activation."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = []
        for count in (channels, out_channels):
            layers += [nn.Conv2d(count, out_channels, 3, padding=1, bias=False)]
            layers += [norm(out_channels), activation()]
        super().__init__(*layers)


class Transposed(nn.ConvTranspose2d):
    """To twice the height and width by a transposed convolution, with half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels // 2, 2, stride=2)


class Bilinear(nn.Module):
    """The same by bilinear interpolation and a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        larger = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.reduce(larger)


class UNet(nn.Module):
    """Images `(B, C, H, W)` -> logits `(B, classes, H, W)`; H and W are multiples of 4."""

    def __init__(
        self,
        channels: int = 3,
        classes: int = CLASSES,
        widths: Sequence[int] = WIDTHS,
        up: Callable[[int], nn.Module] = Transposed,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        of = norm, activation
        self.first = DoubleConv(channels, widths[0], *of)
        self.pool = nn.MaxPool2d(2)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(DoubleConv(*pair, *of) for pair in pairs)
        self.up = nn.ModuleList(up(large) for _, large in reversed(pairs))
        self.join = nn.ModuleList(DoubleConv(large, small, *of) for small, large in reversed(pairs))
        self.last = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = [self.first(x)]
        for down in self.down:
            skipped.append(down(self.pool(skipped[-1])))
        x = skipped.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat((skipped.pop(), up(x)), 1))
        return self.last(x)


def transposed() -> UNet:
    return UNet()


def bilinear() -> UNet:
    return UNet(up=Bilinear)


def with_instance_norm() -> UNet:
    """Norm and activation as of nnU-Net (Isensee and others, arXiv 1809.10486)."""
    affine = lambda count: nn.InstanceNorm2d(count, affine=True)  # noqa: E731
    return UNet(norm=affine, activation=lambda: nn.LeakyReLU(0.01))


def trained(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    """Models in eval mode whose norms have statistics and weights of their own."""
    generator = torch.Generator().manual_seed(0)
    models = [make() for _ in range(count)]
    for model in models:
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith(("weight", "var")) else noise - 0.5)
    return [model.eval() for model in models]
