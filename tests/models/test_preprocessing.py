"""The normalization of channels, and synthetic images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ensemble.errors import InputError
from ensemble.machine import memory
from ensemble.models import images
from ensemble.models.preprocessing import IMAGENET, Preprocessing, adapted


@pytest.mark.parametrize("size", [16, 32, 64, 96, 160, 224, 299, 512])
def test_the_crop_of_imagenet_is_that_of_256_and_224(size: int) -> None:
    assert IMAGENET.shorter_side(size) == round(size * 256 / 224)


def test_one_value_is_for_all_channels_and_known_ones_of_another_number_are_averaged() -> None:
    def with_values(channels: int, *mean: float) -> tuple[float, ...]:
        return adapted(IMAGENET, channels=channels, mean=mean or None, std=None).mean

    assert with_values(3) == IMAGENET.mean
    assert with_values(3, 0.5) == (0.5, 0.5, 0.5)
    assert with_values(3, 0.1, 0.2, 0.3) == (0.1, 0.2, 0.3)
    for channels in (1, 4):
        assert with_values(channels) == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * channels)


def test_a_gray_image_has_one_channel_with_its_mean_and_deviation() -> None:
    gray = Preprocessing((0.25,), (0.5,))
    white = images.preprocess(Image.new("RGB", (20, 20), "white"), image_size=8, preprocessing=gray)
    assert white.shape == (1, 8, 8)
    torch.testing.assert_close(white, torch.full((1, 8, 8), 1.5))
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
    red = images.preprocess(Image.new("RGB", (20, 20), "red"), image_size=8, preprocessing=gray)
    torch.testing.assert_close(red, torch.full((1, 8, 8), (76 / 255 - 0.25) / 0.5))


def test_a_mean_and_a_deviation_are_those_of_each_channel(kitten: Path) -> None:
    own = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    image = images.read_image(kitten)
    batch = images.augmented(image, 2, image_size=32, seed=0, preprocessing=own)
    plain = images.augmented(
        image, 2, image_size=32, seed=0, preprocessing=Preprocessing((0.0,) * 3, (1.0,) * 3)
    )
    assert 0 <= plain.min() < plain.max() <= 1
    for channel in range(3):
        expected = (plain[:, channel] - own.mean[channel]) / own.std[channel]
        torch.testing.assert_close(batch[:, channel], expected)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_synthetic_images_depend_on_seed_and_index_alone(channels: int) -> None:
    plain = Preprocessing((0.0,) * channels, (1.0,) * channels)
    batch = images.synthetic(4, image_size=16, seed=3, preprocessing=plain)
    assert batch.shape == (4, channels, 16, 16)
    assert 0 <= batch.min() < batch.max() <= 1
    fewer = images.synthetic(2, image_size=16, seed=3, preprocessing=plain)
    assert torch.equal(batch[:2], fewer)
    assert torch.equal(images.synthetic(1, image_size=16, seed=5, preprocessing=plain)[0], batch[2])
    flat = batch.flatten(1)
    assert torch.pdist(flat).min() > 1  # no two are alike
    channel_means = batch.mean((2, 3))
    assert (channel_means[0] - channel_means[1]).abs().max() > 0.02
    own = Preprocessing((0.5,) * channels, (0.25,) * channels)
    normalized = images.synthetic(4, image_size=16, seed=3, preprocessing=own)
    torch.testing.assert_close(normalized, (batch - 0.5) / 0.25)


def test_synthetic_images_leave_the_generator_alone_and_are_refused_beyond_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_rng_state()
    images.synthetic(1, image_size=8, seed=0, preprocessing=IMAGENET)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * 3 * 64 * 4)
    with pytest.raises(InputError, match=r"batch_size: 4 images of 8 px require .* at most 3 fit"):
        images.synthetic(4, image_size=8, seed=0, preprocessing=IMAGENET)
