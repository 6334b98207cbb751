"""Fixtures of tests that run the whole command on small models."""

import pytest
import torch
from torch import nn

from ensemble.bench import summary
from ensemble.machine import timing
from ensemble.models.vision import torchvision


@pytest.fixture
def tests_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "TOO_BUSY", 1.0)
    monkeypatch.setattr(summary, "TOO_NOISY", 100.0)
    monkeypatch.setattr(timing, "LONG_S", 0.0)
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """Two MobileNets with ten classes, by their files."""
    folder, models = tmp_path_factory.mktemp("weights"), {}
    for seed in range(2):
        torch.manual_seed(seed)
        model = torchvision.models.mobilenet_v3_small(num_classes=10).eval().requires_grad_(False)
        torch.save(model.state_dict(), folder / f"{seed}.pth")
        models[str(folder / f"{seed}.pth")] = model
    return models
