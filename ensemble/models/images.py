"""Image file -> normalised float tensor, as torchvision's ImageClassification preset does it."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ensemble import files
from ensemble.errors import InputError
from ensemble.machine import memory
from ensemble.models.vision import torchvision

# A sliver of an image becomes huge when its short side is resized, as any does at a huge size.
_MAX_RESIZED_PIXELS = 100_000_000


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image at `path` in RGB, upright (its EXIF orientation obeyed), fully decoded.

    Raises:
        InputError: not there, not an image, truncated, or a decompression bomb.
    """
    path = Path(path)
    files.first_bytes(path, kind="an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = Image.MAX_IMAGE_PIXELS
        message = f"{path}: expected at most {most} pixels, found a decompression bomb ({error})"
        raise InputError(message) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: expected an image file, found another kind of file") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        message = f"{path}: expected a whole image file, found a damaged one ({error})"
        raise InputError(message) from error


def preprocess(image: Image.Image, *, image_size: int) -> Tensor:
    """An RGB image as the `(3, image_size, image_size)` float32 tensor that the models expect.

    Shorter side to round(image_size * 256 / 224), centre crop, ImageNet mean and deviation.

    Raises:
        InputError: the resized image would be too large: a sliver, or a huge `image_size`.
    """
    shorter = _shorter_side(image_size)
    longer = max(image.size) * shorter / min(image.size)
    if shorter * longer > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels after resizing the"
            f" shorter side to {shorter}, found an image of {image.size[0]} x {image.size[1]}",
            argument="image_size",
        )
    # The partial of the enum is torchvision's public name for its ImageClassification preset.
    preset: Callable[[Image.Image], Tensor] = (
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(
            crop_size=image_size, resize_size=shorter
        )
    )
    return preset(image)


class AugmentedImages:
    """px -> `(count, 3, px, px)` float32 on a device: see `augmented`. Each size is made once."""

    def __init__(self, image: Image.Image, count: int, *, seed: int, device: torch.device) -> None:
        self._image, self._count, self._seed, self._device = image, count, seed, device
        self._made: dict[int, Tensor] = {}

    def __call__(self, px: int) -> Tensor:
        if px not in self._made:
            made = augmented(self._image, self._count, image_size=px, seed=self._seed)
            self._made[px] = made.to(self._device)
        return self._made[px]


def augmented(image: Image.Image, count: int, *, image_size: int, seed: int) -> Tensor:
    """`(count, 3, image_size, image_size)`: the plain image, then it, augmented differently.

    Image k depends on `seed` and k alone, so a larger batch begins with the smaller one.

    Raises:
        InputError: more images than memory holds.
    """
    plain = preprocess(image, image_size=image_size)
    needed, free = count * plain.nbytes, memory.available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise InputError(
            f"{count} images of {image_size} px need {needed / 1e9:.1f} GB,"
            f" {free / 1e9:.1f} GB are free: at most {free // plain.nbytes} fit",
            argument="batch_size",
        )
    augment = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(_shorter_side(image_size), scale=(0.3, 1.0)),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        ]
    )
    batch = torch.empty((count, *plain.shape), device=plain.device, dtype=plain.dtype)
    batch[0] = plain
    for index in range(1, count):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)  # torch.manual_seed: all devices
            batch[index] = preprocess(augment(image), image_size=image_size)
    return batch


def labels(num_classes: int) -> list[str] | None:
    """ImageNet's class names where there are as many classes, else None."""
    names = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return names if len(names) == num_classes else None


def _shorter_side(image_size: int) -> int:
    return round(image_size * 256 / 224)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; RGB conversion would clip it to its lowest byte
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "F":
        raise ValueError("its pixels are floating, without a range that is known")
    return image.convert("RGB")
