"""How an image becomes the input of a model: resize, crop, and the normalization of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side is resized to the image size / `crop_pct`, the center is cropped, and each
    channel, from 0 to 1, is normalized to (value - mean) / std.

    The defaults are ImageNet's, as in torchvision's ImageClassification preset.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875  # timm's name of 224 / 256
    interpolation: str = "bilinear"  # or "bicubic", ...: torchvision's InterpolationMode

    @property
    def channels(self) -> int:
        return len(self.mean)

    def shorter_side(self, image_size: int) -> int:
        """The length in pixels that the shorter side is resized to."""
        return round(image_size / self.crop_pct)

    def describe(self) -> str:
        """`mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.875, bilinear`; of equal channels
        one value."""
        channels = f"mean {_shown(self.mean)}, std {_shown(self.std)}"
        return f"{channels}, crop {self.crop_pct:.4g}, {self.interpolation}"


IMAGENET = Preprocessing()


def adapted(
    known: Preprocessing,
    *,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocessing:
    """The preprocessing for a number of channels, with another mean and standard deviation where
    they are given: one value for all channels, or one each.

    Known ones of another number of channels are averaged.
    """
    return replace(
        known,
        mean=_per_channel(known.mean if mean is None else mean, channels),
        std=_per_channel(known.std if std is None else std, channels),
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (fmean(values),) * channels


def _shown(values: Sequence[float]) -> str:
    distinct = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:.4g}" for value in distinct)
