"""Other runtimes: each model's own weights, and detection of wrong conversions."""

import pytest
import torch
from torch import Tensor, nn

import ensemble
from ensemble.errors import UnavailableError
from tests.tiny import independent


class Shifted(nn.Module):
    """An exporter may constant-fold `3 * shift`, with the weights of one model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.add(self.conv(x), self.shift, alpha=3).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")  # of third-party packages
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_constants_derived_from_weights_are_those_of_each_model(name: str) -> None:
    pytest.importorskip("onnxscript" if name == "onnxruntime" else name)
    models: list[nn.Module] = [Shifted(seed).eval().requires_grad_(False) for seed in range(3)]
    x = torch.randn(1, 3, 8, 8)
    found = ensemble.build(name, models, x)(x)
    torch.testing.assert_close(found, independent(models, x), rtol=1e-4, atol=1e-4)


class ConvolvedConstant(nn.Module):
    """OpenVINO overwrites the convolved constant by the difference, which the next call reads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.place = nn.Parameter(torch.randn(1, 3, 8, 8))
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.place) - x).flatten(1)


@pytest.mark.filterwarnings("ignore")  # of third-party packages
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_is_correct_in_every_call_or_unavailable(name: str) -> None:
    pytest.importorskip("onnxscript" if name == "onnxruntime" else name)
    models: list[nn.Module] = [ConvolvedConstant(k).eval().requires_grad_(False) for k in range(3)]
    x = torch.randn(1, 3, 8, 8)
    try:
        forward = ensemble.build(name, models, x)
    except UnavailableError as refusal:
        assert "the converted models disagree with the original" in str(refusal)  # noqa: PT017
        return
    for images in torch.randn(4, 1, 3, 8, 8):
        torch.testing.assert_close(
            forward(images), independent(models, images), rtol=1e-4, atol=1e-4
        )
