"""Image file -> normalised float tensor, as torchvision's ImageClassification preset does it."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ensemble import files
from ensemble.errors import InputError, first_line
from ensemble.machine import memory
from ensemble.models import file_formats
from ensemble.models.vision import torchvision

# A sliver of an image becomes huge when its short side is resized, as any does at a huge size.
_MAX_RESIZED_PIXELS = 100_000_000
_TO_UPRIGHT: dict[object, Image.Transpose] = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow logs some errors before it raises them; without a handler they come out on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image at `path` in RGB, upright (its EXIF orientation obeyed), fully decoded.

    Raises:
        InputError: not there, not an image, truncated, or a decompression bomb.
    """
    path = Path(path)
    head = files.first_bytes(path, kind="an image file", count=file_formats.HEAD_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "EPS":  # Pillow would have Ghostscript run its program
                    raise UnidentifiedImageError("EPS")
                with _no_stderr() if image.format == "TIFF" else nullcontext():
                    image.load()
                if 0 in image.size:
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
                return _to_rgb(_upright(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = Image.MAX_IMAGE_PIXELS
        message = f"{path}: expected at most {most} pixels, found a decompression bomb ({error})"
        raise InputError(message) from error
    except UnidentifiedImageError as error:
        if kind := file_formats.image(head):
            message = f"{path}: expected a whole image file, found a damaged {kind} file"
            raise InputError(message) from error
        other = "another kind of file: convert it to JPEG or PNG"
        found = file_formats.foreign(head, wanted="image")
        found = found or ("a text file" if file_formats.is_text(head) else other)
        raise InputError(f"{path}: expected an image file, found {found}") from error
    except Exception as error:  # of a damaged file Pillow's many decoders raise any kind
        reason = first_line(error)
        message = f"{path}: expected a whole image file, found a damaged one ({reason})"
        raise InputError(message) from error


def preprocess(image: Image.Image, *, image_size: int) -> Tensor:
    """An RGB image as the `(3, image_size, image_size)` float32 tensor that the models expect.

    Shorter side to round(image_size * 256 / 224), centre crop, ImageNet mean and deviation.

    Raises:
        InputError: the resized image would be too large: a sliver, or a huge `image_size`.
    """
    check_size(image, image_size=image_size)
    # The partial of the enum is torchvision's public name for its ImageClassification preset.
    preset: Callable[[Image.Image], Tensor] = (
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(
            crop_size=image_size, resize_size=_shorter_side(image_size)
        )
    )
    return preset(image)


def check_size(image: Image.Image, *, image_size: int) -> None:
    """Raise InputError where `preprocess` would."""
    shorter = _shorter_side(image_size)
    longer = max(image.size) * shorter / min(image.size)
    if shorter * longer > _MAX_RESIZED_PIXELS:
        raise InputError(
            f"expected at most {_MAX_RESIZED_PIXELS:,} pixels after resizing the"
            f" shorter side to {shorter}, found an image of {image.size[0]} x {image.size[1]}",
            argument="image_size",
        )


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


@contextmanager
def _no_stderr() -> Iterator[None]:
    """libtiff prints there itself what Pillow then raises as an error without a reason."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation asks for; one that cannot be read is ignored.

    ImageOps.exif_transpose also writes the other tags again, and fails on any that is damaged.
    """
    try:
        method = _TO_UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of damaged EXIF data Pillow raises any kind
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; RGB conversion would clip it to its lowest byte
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "F":
        raise ValueError("its pixels are floating, without a range that is known")
    return image.convert("RGB")
