"""Image file, or a seed -> normalized float tensor, by torchvision's ImageClassification preset."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from ensemble import files
from ensemble.errors import InputError, first_line
from ensemble.machine import memory
from ensemble.models import file_formats
from ensemble.models.preprocessing import IMAGENET, Preprocessing
from ensemble.models.vision import torchvision

# Resizing the shorter side makes an image of extreme aspect ratio huge, as a large size does any.
_MAX_RESIZED_PIXELS = 100_000_000
_MAX_TEXT_BYTES = 2**28  # of a PNG, decompressed; Pillow's default rejects more than 1 MB
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_COARSE = 8  # cells a side of the coarse structure of synthetic images
_TO_UPRIGHT: dict[object, Image.Transpose] = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow logs some errors before raising them; without a handler they are printed to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image at `path` in RGB, fully decoded, with its EXIF orientation applied.

    Raises:
        InputError: the file does not exist, is not an image, is corrupted, is a decompression
            bomb, or has pixels of unknown range.
    """
    path = Path(path)
    head = files.first_bytes(path, kind="an image file", count=file_formats.HEAD_BYTES)
    try:
        with warnings.catch_warnings(), _long_texts():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "EPS":  # Pillow would execute it with Ghostscript
                    raise UnidentifiedImageError("EPS")
                with _no_stderr() if image.format == "TIFF" else nullcontext():
                    image.load()
                if 0 in image.size:
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
                unscaled = _unscaled_pixels(image)
                if not unscaled:
                    return _to_rgb(_upright(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = Image.MAX_IMAGE_PIXELS
        message = f"{path}: expected at most {most} pixels, got a decompression bomb ({error})"
        raise InputError(message) from error
    except UnidentifiedImageError as error:
        if kind := file_formats.image(head):
            message = f"{path}: expected a valid image file, got a corrupted {kind} file or an"
            message += " unsupported variant; convert it to an 8-bit PNG"
            raise InputError(message) from error
        unknown = "an unknown format; convert it to JPEG or PNG"
        found = file_formats.identify(head, wanted="image")
        found = found or ("a text file" if file_formats.is_text(head) else unknown)
        raise InputError(f"{path}: expected an image file, got {found}") from error
    except Exception as error:  # Pillow's decoders raise any type for corrupted files
        reason = first_line(error)
        message = f"{path}: expected a valid image file, got a corrupted one ({reason})"
        raise InputError(message) from error
    raise InputError(
        f"{path}: expected pixels of 8 or 16 bits, got {unscaled} pixels, whose range is unknown;"
        " scale them to 0-255 and save an 8-bit PNG"
    )


def preprocess(
    image: Image.Image, *, image_size: int, preprocessing: Preprocessing = IMAGENET
) -> Tensor:
    """An RGB image as the `(3, image_size, image_size)` float32 input of the models; in grayscale
    `(1, image_size, image_size)`, if the preprocessing has one channel.

    Raises:
        InputError: the resized image would be too large, by its aspect ratio or by `image_size`.
    """
    check_size(image, image_size=image_size, preprocessing=preprocessing)
    # torchvision has no other public name for its ImageClassification preset.
    preset: Callable[[Image.Image], Tensor] = (
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(
            crop_size=image_size,
            resize_size=preprocessing.shorter_side(image_size),
            mean=preprocessing.mean,
            std=preprocessing.std,
            interpolation=torchvision.transforms.InterpolationMode(preprocessing.interpolation),
        )
    )
    return preset(image.convert("L") if preprocessing.channels == 1 else image)


def check_size(
    image: Image.Image, *, image_size: int, preprocessing: Preprocessing = IMAGENET
) -> None:
    """Raise InputError where `preprocess` would."""
    shorter = preprocessing.shorter_side(image_size)
    longer = max(image.size) * shorter / min(image.size)
    if shorter * longer > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels after resizing the"
            f" shorter side to {shorter}, got an image of {image.size[0]} x {image.size[1]}",
            argument="image_size",
        )


class CachedImages:
    """px -> `(count, channels, px, px)` float32 on a device: what `make` gives, cached by size."""

    def __init__(self, make: Callable[[int], Tensor], device: torch.device) -> None:
        self._make, self._device = make, device
        self._cache: dict[int, Tensor] = {}

    def __call__(self, px: int) -> Tensor:
        if px not in self._cache:
            self._cache[px] = self._make(px).to(self._device)
        return self._cache[px]


def synthetic(count: int, *, image_size: int, seed: int, preprocessing: Preprocessing) -> Tensor:
    """`(count, channels, image_size, image_size)`: random images of coarse and fine structure.

    Each channel has values from 0 to 1, which are then normalized. Image k depends only on `seed`
    and k, so a smaller batch is a prefix of a larger one.

    Raises:
        InputError: the images do not fit in memory.
    """
    shape = (preprocessing.channels, image_size, image_size)
    _check_memory(count, 4 * math.prod(shape), image_size)
    batch = torch.empty((count, *shape), device="cpu", dtype=torch.float32)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    for index in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        options: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        coarse = torch.rand((1, preprocessing.channels, _COARSE, _COARSE), **options)
        resized = interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)[0]
        fine = torch.rand(shape, **options)
        batch[index] = (0.75 * resized + 0.25 * fine - mean) / std
    return batch


def augmented(
    image: Image.Image,
    count: int,
    *,
    image_size: int,
    seed: int,
    preprocessing: Preprocessing = IMAGENET,
) -> Tensor:
    """`(count, channels, image_size, image_size)`: the image itself, then random augmentations.

    Image k depends only on `seed` and k, so a smaller batch is a prefix of a larger one.

    Raises:
        InputError: the images do not fit in memory.
    """
    plain = preprocess(image, image_size=image_size, preprocessing=preprocessing)
    _check_memory(count, plain.nbytes, image_size)
    shorter = preprocessing.shorter_side(image_size)
    augment = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(shorter, scale=(0.3, 1.0)),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        ]
    )
    batch = torch.empty((count, *plain.shape), device=plain.device, dtype=plain.dtype)
    batch[0] = plain
    for index in range(1, count):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)  # torch.manual_seed: all devices
            other = augment(image)
        batch[index] = preprocess(other, image_size=image_size, preprocessing=preprocessing)
    return batch


def _check_memory(count: int, bytes_each: int, image_size: int) -> None:
    needed, free = count * bytes_each, memory.available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise InputError(
            f"{count} images of {image_size} px require {needed / 1e9:.1f} GB,"
            f" {free / 1e9:.1f} GB available; at most {free // bytes_each} fit",
            argument="batch_size",
        )


def labels(num_classes: int) -> list[str] | None:
    """ImageNet's class names if `num_classes` is theirs, else None."""
    names = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return names if len(names) == num_classes else None


@contextmanager
def _long_texts() -> Iterator[None]:
    """Have Pillow read PNGs with long texts, such as the workflow that a generator embeds."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence libtiff, which prints its errors to file descriptor 2."""
    try:
        saved = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied; an invalid orientation is ignored.

    ImageOps.exif_transpose also rewrites the other tags, and fails if any of them is invalid.
    """
    try:
        method = _TO_UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises any type for invalid EXIF data
        method = None
    return image if method is None else image.transpose(method)


def _unscaled_pixels(image: Image.Image) -> str:
    """The kind of pixels whose black and white the file does not define; empty for all others."""
    if image.mode == "F":
        return "floating-point"
    if image.mode != "I":
        return ""
    # Formats with at most 16 bits per sample have this mode too.
    tags = getattr(image, "tag_v2", {})
    is_16_bit = image.format in ("PNG", "PPM") or tags.get(_BITS_PER_SAMPLE) == (16,)
    if not is_16_bit:
        return "32-bit integer"
    lowest = image.getextrema()[0]
    return "negative" if isinstance(lowest, int | float) and lowest < 0 else ""


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which the conversion to RGB would clip to 8 bits
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image.convert("RGB")
