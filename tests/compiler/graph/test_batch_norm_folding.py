"""Batch norm folding computes the same."""

import pytest
import torch
from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding
from ensemble.errors import UnavailableError
from ensemble.models import stacking
from tests.checkpoints import lively
from tests.tiny import tiny_models


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "left"),
    [
        ("resnet18", 0),
        pytest.param("resnet50", 0, marks=pytest.mark.slow),
        ("mobilenet_v2", 0),
        pytest.param("vgg11_bn", 0, marks=pytest.mark.slow),
        ("densenet121", 62),
    ],
)
def test_a_folded_model_computes_the_same_without_its_norms(arch: str, left: int) -> None:
    models = [lively(arch, seed) for seed in range(2)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = [model.double()(x.double()) for model in models]
        found = batch_norm_folding.folded([model.float() for model in models], x)
        for model, reference in zip(found, expected, strict=True):
            assert norms(model) == left
            error = (model(batch_norm_folding.channels_last(x)).double() - reference).abs().max()
            assert float(error / reference.abs().max()) < 2e-5


def test_folding_does_not_modify_the_models() -> None:
    models = tiny_models(2)
    before = [model.get_parameter("conv.weight").clone() for model in models]
    batch_norm_folding.folded(models, torch.randn(1, 3, 8, 8))
    for model, weight in zip(models, before, strict=True):
        assert torch.equal(model.get_parameter("conv.weight"), weight)
        assert norms(model) == 1


def test_folded_models_are_slices_of_one_channels_last_stack() -> None:
    models = batch_norm_folding.folded(tiny_models(3), torch.randn(1, 3, 8, 8))
    stack = stacking.stacked_state(models)["conv.weight"]
    weight = models[1].get_parameter("conv.weight")
    assert stack[1].data_ptr() == weight.data_ptr()
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 2, 3, 4, 5)])
def test_channels_last_changes_the_memory_and_not_the_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = batch_norm_folding.channels_last(x)
    assert torch.equal(found, x)
    assert found.stride()[-3:] == (1, 15, 3)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


def test_a_model_that_does_not_run_channels_last_is_reported() -> None:
    with pytest.raises(
        UnavailableError, match="does not run channels-last: RuntimeError: view size"
    ):
        batch_norm_folding.folded([Flat().eval()], torch.randn(2, 3, 4, 4))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_a_branch_on_values_is_evaluated_at_each_call() -> None:
    model, x = Branching().eval(), torch.rand(2, 3, 4, 4)
    (found,) = batch_norm_folding.folded([model], x)
    assert norms(found) == 1  # another branch may lead past the convolution
    for images in (x, -x):
        torch.testing.assert_close(found(images), model(images))
