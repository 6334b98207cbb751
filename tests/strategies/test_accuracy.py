"""Quiet outputs beside loud ones keep their digits; rounding that all have is no fault."""

import pytest
import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.errors import UnavailableError
from ensemble.strategies.accuracy import OutputAccuracy
from tests.tiny import independent

pytestmark = pytest.mark.usefixtures("one_thread")


class QuietBesideLoud(nn.Module):
    """A 1x1 convolution whose second half of outputs reads only the second half of inputs."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        half = channels // 2
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        with torch.no_grad():
            self.conv.weight[half:, :half] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def models_of(kind: type[nn.Module]) -> list[nn.Module]:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(kind().eval().requires_grad_(False))
    return models


def in_float64(models: list[nn.Module], x: Tensor) -> Tensor:
    found = independent([model.double() for model in models], x.double())
    for model in models:
        model.float()
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("contrast", [1.0, 1e2, 1e4, 1e6])
def test_quiet_channels_beside_loud_ones_are_not_lost_by_strassen(contrast: float) -> None:
    models = models_of(QuietBesideLoud)
    x = torch.randn(1, 256, 28, 28, generator=torch.Generator().manual_seed(1))
    x[:, :128] *= contrast
    built = strategies.build_unverified("lowered_vmap", models, x)
    expected = in_float64(models, x)
    for half in (slice(None, 128), slice(128, None)):
        assert relative_error(built.forward(x)[..., half], expected[..., half]) < 3e-5
    assert ("1 Strassen" in built.note) == (contrast == 1.0)
    assert ("small outputs lost digits next to large ones" in built.note) == (contrast > 1.0)


@pytest.mark.parametrize("contrast", [1.0, 1e4])
def test_a_quiet_part_of_an_image_beside_a_loud_one_is_not_lost_by_winograd(
    contrast: float,
) -> None:
    models = models_of(Plain)
    x = torch.randn(1, 64, 28, 28, generator=torch.Generator().manual_seed(1))
    x[..., :14] *= contrast
    built = strategies.build_unverified("lowered_vmap", models, x)
    found, expected = built.forward(x), in_float64(models, x)
    for column in range(28):
        assert relative_error(found[..., column], expected[..., column]) < 3e-5
    assert "Winograd" in built.note  # where tiles do not mix the two parts
    assert ("fewer fast kernels: small outputs" in built.note) == (contrast > 1.0)


def images(outputs: int = 1000) -> tuple[list[nn.Module], Tensor, Tensor]:
    """A linear classifier, an image, and its logits in float64."""
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Flatten(), nn.Linear(192, outputs)).eval())
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return models, x, in_float64(models, x)


@torch.no_grad()
def test_logits_that_cancel_are_no_loss() -> None:
    models, x, expected = images()
    accuracy = OutputAccuracy(models, x, in_float64=True)
    largest = float(expected.abs().max())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(expected.shape, generator=generator, dtype=torch.float64) * largest
    assert float((expected.abs() / largest).min()) < 1e-2  # of these 1e-6 of the largest is much
    assert not accuracy.loses_small_outputs((expected + 1e-7 * noise).float())
    assert accuracy.loses_small_outputs((expected + 5e-4 * noise).float())


@torch.no_grad()
def test_one_quiet_class_is_held_to_its_own_size() -> None:
    models, x, _ = images(outputs=10)
    for model in models:
        model[1].weight[3] *= 1e-5  # type: ignore[index]
        model[1].bias[3] *= 1e-5  # type: ignore[index]
    expected = in_float64(models, x)
    accuracy = OutputAccuracy(models, x, in_float64=True)
    assert not accuracy.loses_small_outputs(expected.float())
    found = expected.float()
    found[:, :, 3] += 1e-7 * found.abs().max()  # 1e-2 of that class
    assert accuracy.loses_small_outputs(found)


@torch.no_grad()
def test_outputs_that_are_no_rounded_numbers_are_not_judged() -> None:
    models, x, expected = images()
    accuracy = OutputAccuracy(models, x, in_float64=True)
    assert not accuracy.loses_small_outputs(expected.argmax(-1))
    assert not accuracy.loses_small_outputs(expected.mean((1, 2)).float())
    found = expected.float()
    found[0, 0, 0] = float("nan")
    assert not accuracy.loses_small_outputs(found)


@torch.no_grad()
def test_a_build_that_computes_something_else_is_refused() -> None:
    models, x, expected = images()
    accuracy = OutputAccuracy(models, x, in_float64=False)
    accuracy.check(expected.float() * (1 + 1e-5))
    with pytest.raises(UnavailableError, match="its trace gives another result than the model"):
        accuracy.check(expected.flip(0).float())
