"""Image files, preprocessing and augmented images."""

import io
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torchvision.transforms._presets import ImageClassification

from ensemble.errors import InputError
from ensemble.machine import memory
from ensemble.models import images

EXIF_ORIENTATION = 0x0112


def gradient() -> Image.Image:
    """A 48 x 32 RGB image, different in every pixel, row and channel."""
    y, x = np.mgrid[0:32, 0:48].astype(np.uint8)
    return Image.fromarray(np.stack([5 * x, 7 * y, 2 * x + 3 * y], axis=2).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def read(path: Path) -> np.ndarray:
    return pixels(images.read_image(path))


# The tensor


@pytest.mark.parametrize("size", [64, 224, 720])
def test_preprocess_matches_torchvisions_preset(kitten: Path, size: int) -> None:
    preset = ImageClassification(crop_size=size, resize_size=round(size * 256 / 224))
    with Image.open(kitten) as image:
        expected = preset(image.convert("RGB"))
    found = images.preprocess(images.read_image(kitten), image_size=size)
    assert found.shape == (3, size, size)
    assert torch.equal(found, expected)


def test_white_and_black_are_normalized_with_imagenets_statistics() -> None:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for color, value in (("white", 1.0), ("black", 0.0)):
        found = images.preprocess(Image.new("RGB", (40, 30), color), image_size=16)
        expected = ((value - mean) / deviation)[:, None, None].expand(3, 16, 16)
        torch.testing.assert_close(found, expected)


def test_an_image_of_extreme_aspect_ratio_is_rejected() -> None:
    sliver = Image.new("RGB", (1, 60_000))
    message = "image_size: expected at most 100,000,000 pixels .* an image of 1 x 60000"
    with pytest.raises(InputError, match=message):
        images.preprocess(sliver, image_size=224)


def test_a_huge_image_size_is_rejected() -> None:
    with pytest.raises(InputError, match=r"shorter side to 114286, got an image of 451 x 300"):
        images.preprocess(Image.new("RGB", (451, 300)), image_size=100_000)


# Image modes


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    upright = gradient()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # rotate clockwise by 90 degrees
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    path = saved(rotated, tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(read(path), pixels(upright))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_gray_images_have_three_equal_channels(tmp_path: Path, mode: str) -> None:
    gray = gradient().convert("L")
    if mode == "1":
        gray = gray.point(lambda value: 255 * (value > 100))
    path = saved(gray.convert(mode, dither=Image.Dither.NONE), tmp_path / "gray.png")
    with Image.open(path) as image:
        assert image.mode == mode
    assert np.array_equal(read(path), np.stack([np.asarray(gray)] * 3, axis=2))


def test_an_alpha_channel_is_dropped_and_colors_are_kept(tmp_path: Path) -> None:
    image = gradient()
    image.putalpha(image.getchannel("R"))
    path = saved(image, tmp_path / "alpha.png")
    assert np.array_equal(read(path), pixels(gradient()))


def test_a_cmyk_image_is_converted_to_rgb(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found = read(saved(cyan, tmp_path / "cmyk.tif"))
    assert np.array_equal(
        found, np.broadcast_to(np.array([0, 255, 255], dtype=np.uint8), (16, 16, 3))
    )


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_a_palette_image_has_the_colors_of_its_palette(
    tmp_path: Path, transparency: int | bytes | None
) -> None:
    palette = [255, 0, 0, 0, 255, 0, 1, 2, 3]
    image = Image.fromarray(np.arange(9, dtype=np.uint8).reshape(3, 3) % 3).convert("P")
    image.putpalette(palette)
    options = {} if transparency is None else {"transparency": transparency}
    path = saved(image, tmp_path / "palette.png", **options)
    with Image.open(path) as reopened:
        assert (reopened.mode, "transparency" in reopened.info) == ("P", bool(options))
    expected = np.array(palette, dtype=np.uint8).reshape(3, 3)[np.arange(9).reshape(3, 3) % 3]
    assert np.array_equal(read(path), expected)


def test_16_bit_gray_is_scaled_to_8_bit_gray(tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = saved(Image.fromarray(gray.astype(np.uint16) * 257), tmp_path / "deep.png")
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert np.array_equal(read(path), np.stack([gray] * 3, axis=2))


def test_big_endian_16_bit_gray_is_scaled_to_8_bit_gray(tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint8)
    content = (gray.astype(">u2") * np.uint16(257)).astype(">u2").tobytes()
    tags = [(256, 16), (257, 16), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16)]
    tags += [(279, len(content))]
    directory = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = struct.pack(">2sHI", b"MM", 42, 8 + len(content))
    path = tmp_path / "big.tif"
    path.write_bytes(head + content + struct.pack(">H", len(tags)) + directory + bytes(4))
    with Image.open(path) as image:
        assert image.mode == "I;16B"
    assert np.array_equal(read(path), np.stack([gray.reshape(16, 16)] * 3, axis=2))


@pytest.mark.skipif(not features.check("webp"), reason="needs a Pillow with WebP")
def test_a_lossless_webp_is_decoded_exactly(tmp_path: Path) -> None:
    path = saved(gradient(), tmp_path / "image.webp", lossless=True)
    assert np.array_equal(read(path), pixels(gradient()))


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = saved(first, tmp_path / "frames.gif", save_all=True, append_images=[second])
    assert np.array_equal(read(path), pixels(first))


# Invalid EXIF data

X_RESOLUTION, GPS, PHOTOGRAPH = 0x011A, 0x8825, 0x8769
ASCII, SHORT, LONG, UNDEFINED, SIGNED_RATIONAL = 2, 3, 4, 7, 10
TURN = (EXIF_ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data from (tag, type, count, four bytes: the value or its offset)."""
    end = 10 + 12 * len(entries) + 4  # of the value -1/0
    directory = b"".join(
        struct.pack("<HHI", tag, kind, count) + (value or struct.pack("<I", end))
        for tag, kind, count, value in sorted(entries)
    )
    count = struct.pack("<H", len(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + count + directory + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "damaged",
    [
        (X_RESOLUTION, SIGNED_RATIONAL, 1, b""),
        (X_RESOLUTION, UNDEFINED, 4, b"\0\1\2\3"),
        (X_RESOLUTION, ASCII, 4, b"abc\0"),
        (X_RESOLUTION, 5, 1, b"\xff\xff\xff\x7f"),
        (X_RESOLUTION, 99, 1, b"\0\0\0\0"),
        (GPS, LONG, 1, b"\xff\xff\xff\x7f"),
        (PHOTOGRAPH, ASCII, 4, b"abc\0"),
    ],
    ids=["-1/0", "bytes", "text", "nowhere", "type", "gps", "photograph"],
)
def test_invalid_exif_tags_do_not_hide_the_orientation(
    tmp_path: Path, suffix: str, damaged: tuple[int, int, int, bytes]
) -> None:
    plain = np.array(gradient())
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
    rotated = Image.fromarray(plain).transpose(Image.Transpose.ROTATE_90)
    path = saved(rotated, tmp_path / f"damaged.{suffix}", exif=exif(TURN, damaged), **options)
    found = read(path)
    assert found.shape == plain.shape
    assert abs(found.astype(int) - plain).mean() < 3  # JPEG is lossy; 60 if rotated wrongly


@pytest.mark.parametrize(
    "orientation",
    [
        (EXIF_ORIENTATION, SHORT, 1, b"\0\0\0\0"),
        (EXIF_ORIENTATION, SHORT, 1, b"\x09\0\0\0"),
        (EXIF_ORIENTATION, ASCII, 4, b"abc\0"),
        (EXIF_ORIENTATION, UNDEFINED, 4, b"\6\0\0\0"),
        (EXIF_ORIENTATION, SIGNED_RATIONAL, 1, b""),
        (EXIF_ORIENTATION, SHORT, 9, b"\xff\xff\xff\x7f"),
        (EXIF_ORIENTATION, 99, 1, b"\6\0\0\0"),
    ],
)
def test_an_invalid_orientation_is_ignored(
    tmp_path: Path, orientation: tuple[int, int, int, bytes]
) -> None:
    path = saved(gradient(), tmp_path / "damaged.png", exif=exif(orientation))
    assert np.array_equal(read(path), pixels(gradient()))


@pytest.mark.parametrize(
    "content", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"\xff" * 40]
)
def test_invalid_exif_data_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = saved(gradient(), tmp_path / "damaged.png", exif=content)
    assert np.array_equal(read(path), pixels(gradient()))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_rotated_once(tmp_path: Path, compression: str) -> None:
    rotated = gradient().transpose(Image.Transpose.ROTATE_90)
    options = {"compression": compression, "tiffinfo": {EXIF_ORIENTATION: 6}}
    path = saved(rotated, tmp_path / "turned.tif", **options)
    assert np.array_equal(read(path), pixels(gradient()))


# Corrupted files


def samples() -> Iterator[tuple[str, bytes]]:
    """(format, content) of a small image in many formats."""
    image, other = gradient(), gradient().rotate(90)
    data = Image.Exif()
    data[EXIF_ORIENTATION], data[X_RESOLUTION] = 6, 72.5
    frames = {"save_all": True, "append_images": [other]}
    for kind, picture, options in (
        ("JPEG", image, {"exif": data}),
        ("JPEG", image, {"progressive": True}),
        ("JPEG", image.convert("CMYK"), {}),
        ("PNG", image, {"exif": data}),
        ("PNG", image.quantize(16), {"transparency": 3}),
        ("PNG", image, frames),
        ("GIF", image, frames),
        ("TIFF", image, {"exif": data}),
        ("TIFF", image, {"compression": "tiff_lzw", "tiffinfo": {EXIF_ORIENTATION: 6}}),
        ("TIFF", image, {"compression": "tiff_adobe_deflate"}),
        *(
            [("WEBP", image, {"exif": data}), ("WEBP", image, frames)]
            * bool(features.check("webp"))
        ),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)  # type: ignore[arg-type]
        yield kind, buffer.getvalue()


def mutated(content: bytes, drawn: random.Random) -> bytes:
    """Some bytes changed, deleted or inserted, mostly near the beginning."""
    changed = bytearray(content)
    for _ in range(drawn.choice([1, 1, 2, 4, 16])):
        place = drawn.randrange(4, len(changed) if drawn.random() < 0.3 else 200)
        how = drawn.random()
        if how < 0.7:
            changed[place : place + 1] = bytes(
                [drawn.choice([0, 1, 128, 255, drawn.randrange(256)])]
            )
        elif how < 0.8:
            del changed[place : place + drawn.randrange(1, 9)]
        elif how < 0.9:
            changed[place:place] = drawn.randbytes(drawn.randrange(1, 9))
        else:
            changed[place : place + 4] = struct.pack("<i", drawn.choice([-1, 2**31 - 1, -(2**31)]))
    return bytes(changed[: drawn.randrange(40, len(changed))] if drawn.random() < 0.1 else changed)


def test_a_corrupted_image_is_read_or_raises_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn, read_whole, refused = random.Random(0), 0, 0
    for kind, content in samples():
        for index in range(60):
            path = tmp_path / f"{index}.{kind.lower()}"
            path.write_bytes(mutated(content, drawn))
            try:
                assert images.read_image(path).mode == "RGB"
                read_whole += 1
            except InputError as error:
                message = str(error)
                assert message.startswith(f"{path}: expected ")
                assert len(message.splitlines()) == 1
                refused += 1
    assert min(read_whole, refused) > 100
    assert capfd.readouterr() == ("", "")  # libtiff would print its errors


def test_a_corrupted_image_ends_the_program_with_a_one_line_error(tmp_path: Path) -> None:
    path = saved(gradient(), tmp_path / "cut.tif", compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[8:200] = bytes(192)
    path.write_bytes(content)
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "resnet_vmap.py"),
        "--image_path",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {path}: expected a valid image file")


# Errors


def assert_refused(path: Path, message: str) -> None:
    """The error is the file name, then the pattern `message`."""
    with pytest.raises(InputError, match="^" + re.escape(f"{path}: ") + message):
        images.read_image(path)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.jpg", "expected an image file, but no such file exists")


def test_a_url_is_rejected_with_advice_to_download_it() -> None:
    message = "https://a.org/x.jpg: expected the path of an image file, got a URL; download"
    with pytest.raises(InputError, match="^" + re.escape(message)):
        images.read_image("https://a.org/x.jpg")


def test_a_directory_is_not_an_image(tmp_path: Path) -> None:
    assert_refused(tmp_path, "expected an image file, got a directory")


def test_a_file_name_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    assert_refused(path, "expected an image file, but it cannot be read: File name too long")


def test_an_empty_file_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert_refused(path, "expected an image file, got an empty file")


def test_text_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("not an image\n" * 99)
    assert_refused(path, "expected an image file, got a text file")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
            "a Git LFS pointer .*git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page .*download the file itself"),
        (b'{"error": "not found"}', "a JSON document"),
        (b"<?xml version='1.0'?>\n<svg width='1'></svg>", "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image; convert it to JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a PDF or PostScr"),
        (b"\x93NUMPY\x01\0v\0{'descr': '|u1'", "a numpy array; convert it to JPEG or PNG"),
        (b"\0\1\2\3" * 9, "an unknown format; convert it to JPEG or PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), ""),
    ],
    ids=["lfs", "html", "json", "svg", "heic", "eps", "npy", "unknown", "damaged"],
)
def test_other_formats_in_place_of_an_image_are_identified(
    tmp_path: Path, content: bytes, found: str
) -> None:
    path = tmp_path / "kitten.jpg"
    path.write_bytes(content)
    expected = f"an image file, got {found}" if found else "a valid image .* a corrupted PNG file"
    assert_refused(path, f"expected {expected}")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read any file")
def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = saved(gradient(), tmp_path / "secret.png")
    path.chmod(0)
    assert_refused(path, "expected an image file, but it cannot be read: Permission")


def test_an_image_without_pixels_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(gradient(), tmp_path / "none.png")
    monkeypatch.setattr(Image, "open", lambda path: Image.new("RGB", (0, 32)))
    assert_refused(path, r"expected a valid image file, .*0 x 32 pixels")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_a_truncated_image_is_not_decoded_partially(tmp_path: Path, suffix: str) -> None:
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    path = saved(Image.fromarray(noise), tmp_path / f"truncated.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    assert_refused(path, "expected a valid image file, got a corrupted one")


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow with AVIF")
def test_an_image_whose_decoder_fails_is_corrupted(tmp_path: Path) -> None:
    path = saved(gradient(), tmp_path / "damaged.avif")
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))
    assert_refused(path, "expected a valid image file, got a corrupted one")


@pytest.mark.parametrize("most", [48 * 32 - 1, 48 * 32 // 2 - 1], ids=["warning", "error"])
def test_a_decompression_bomb_is_rejected_whether_pillow_warns_or_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    path = saved(gradient(), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    assert_refused(path, rf"expected at most {most} pixels, got a decompression bomb \(.*1536")


@pytest.mark.parametrize(
    ("mode", "value", "kind"),
    [("F", 0.5, "floating-point"), ("I", 200, "32-bit integer"), ("I", 10**6, "32-bit integer")],
)
def test_pixels_of_unknown_range_are_rejected_with_advice(
    tmp_path: Path, mode: str, value: float, kind: str
) -> None:
    path = saved(Image.new(mode, (8, 8), value), tmp_path / "deep.tif")
    message = f"expected pixels of 8 or 16 bits, got {kind} pixels, whose range is unknown; scale"
    assert_refused(path, message)


@pytest.mark.parametrize(("lowest", "is_read"), [(0, True), (-1, False)])
def test_signed_16_bit_gray_is_read_where_nothing_is_negative(
    tmp_path: Path, lowest: int, is_read: bool
) -> None:
    gray = np.full((4, 4), 257 * 100, np.int16)
    gray[0, 0] = lowest
    content = io.BytesIO()
    Image.fromarray(gray.astype(np.uint16)).save(content, "TIFF", tiffinfo={339: 2})
    path = tmp_path / "signed.tif"
    path.write_bytes(content.getvalue())
    with Image.open(path) as image:
        assert image.mode == "I"
    if is_read:
        assert read(path)[1, 1].tolist() == [100] * 3
    else:
        assert_refused(path, "expected pixels of 8 or 16 bits, got negative pixels, whose")


def test_16_bit_pixels_of_a_pgm_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 2 1 65535 " + np.array([257, 65535], ">u2").tobytes())
    assert read(path)[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_png_with_a_long_text_is_read(tmp_path: Path, is_compressed: bool) -> None:
    text, limits = PngImagePlugin.PngInfo(), PngImagePlugin.MAX_TEXT_CHUNK
    text.add_text("workflow", 70_000_000 * "x", zip=is_compressed)
    path = saved(gradient(), tmp_path / "text.png", pnginfo=text)
    assert np.array_equal(read(path), pixels(gradient()))
    assert limits == PngImagePlugin.MAX_TEXT_CHUNK


# Augmented images


@pytest.fixture(scope="module")
def image(kitten: Path) -> Image.Image:
    return images.read_image(kitten)


def test_the_first_image_is_unaugmented_and_all_images_differ(image: Image.Image) -> None:
    batch = images.augmented(image, 4, image_size=32, seed=0)
    assert torch.equal(batch[0], images.preprocess(image, image_size=32))
    apart = [(batch[i] - batch[j]).abs().mean() for i in range(4) for j in range(i)]
    assert min(apart) > 0.05


def test_a_smaller_batch_is_a_prefix_of_a_larger_one(image: Image.Image) -> None:
    small = images.augmented(image, 2, image_size=32, seed=3)
    assert torch.equal(images.augmented(image, 4, image_size=32, seed=3)[:2], small)


def test_another_seed_gives_other_augmentations(image: Image.Image) -> None:
    batch = images.augmented(image, 2, image_size=32, seed=0)
    other = images.augmented(image, 2, image_size=32, seed=100)
    assert torch.equal(batch[0], other[0])
    assert not torch.allclose(batch[1], other[1])


def test_augmentation_leaves_the_global_random_state_unchanged(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    images.augmented(image, 2, image_size=32, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_more_images_than_memory_holds_are_rejected_before_allocation(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 3 * 32 * 32 * 4
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * each)
    assert len(images.augmented(image, 2, image_size=32, seed=0)) == 2
    with pytest.raises(InputError, match=r"batch_size: 3 images of 32 px .* at most 2 fit"):
        images.augmented(image, 3, image_size=32, seed=0)


def test_augmentations_of_a_panorama_are_cropped_before_resizing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []
    plain = images.preprocess

    def spy(image: Image.Image, **options: Any) -> torch.Tensor:
        sizes.append(image.size)
        return plain(image, **options)

    monkeypatch.setattr(images, "preprocess", spy)
    images.augmented(Image.new("RGB", (3000, 30)), 2, image_size=28, seed=0)
    assert sizes == [(3000, 30), (32, 32)]


# Labels


def test_class_281_of_1000_is_tabby() -> None:
    names = images.labels(1000)
    assert names is not None
    assert (len(names), names[0], names[281]) == (1000, "tench", "tabby")


@pytest.mark.parametrize("classes", [10, 999, 1001])
def test_other_numbers_of_classes_have_no_labels(classes: int) -> None:
    assert images.labels(classes) is None
