from collections.abc import Sequence

import functorch
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
from ensemble import stacking
from ensemble.strategies import STRATEGIES
from tests.tiny import TinyNet, tiny_models

ON_CPU = ["loop", "vmap"]


def independent(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What each model by itself makes of its own input, without any code of `ensemble`."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    with torch.no_grad():
        return torch.stack([model(own) for model, own in zip(models, inputs, strict=True)])


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("num_models", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (None, 2, 3, 8, 8)], ids=["shared", "per_model"])
def test_logits_are_those_of_each_model_by_itself(
    name: str, num_models: int, shape: tuple[int | None, ...]
):
    models = tiny_models(num_models)
    sizes = [num_models if size is None else size for size in shape]
    example, x = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(1))
    expected = independent(models, x)
    forward = ensemble.build(name, models, example)
    torch.testing.assert_close(forward(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_depth_of_resnet_gives_the_logits_of_the_models_themselves(name: str, arch: str):
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(torchvision.models.get_model(arch, num_classes=7).eval())
    x = torch.randn(1, 3, 32, 32)
    expected = independent(models, x)
    found = ensemble.build(name, models, x)(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ON_CPU)
def test_nothing_is_recorded_for_a_gradient(name: str):
    forward = ensemble.build(name, tiny_models(2), torch.randn(1, 3, 8, 8))
    assert forward(torch.randn(1, 3, 8, 8)).is_inference()


def test_vmap_runs_on_the_models_own_memory():
    models = stacking.allocate(TinyNet(), 2, device=torch.device("cpu"))
    for model, source in zip(models, tiny_models(2), strict=True):
        model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 8, 8)
    forward = ensemble.build("vmap", models, x)
    models[1].fc.bias.fill_(100.0)  # type: ignore[union-attr, operator]
    assert bool((forward(x)[1] > 50).all())
    assert bool((forward(x)[0] < 50).all())


def test_vmap_without_combine_state_for_ensemble_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    models, x = tiny_models(3), torch.randn(2, 3, 8, 8)
    expected = ensemble.build("vmap", models, x)(x)
    monkeypatch.delattr(functorch, "combine_state_for_ensemble")
    torch.testing.assert_close(ensemble.build("vmap", models, x)(x), expected, rtol=0, atol=0)


def test_an_unknown_strategy_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"expected a strategy out of loop, vmap.*found 'magic'"):
        ensemble.build("magic", tiny_models(1), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(3, 8, 8), r"expected an example of shape \(B, 3, H, W\).*found \(3, 8, 8\)"),
        (torch.zeros(3, 1, 3, 8, 8), r"or \(2, B, 3, H, W\), found \(3, 1, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8).half(), "expected an example in torch.float32 on cpu"),
    ],
)
def test_an_example_that_does_not_fit_the_models_is_refused(example: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ensemble.build("loop", tiny_models(2), example)


def test_models_in_train_mode_are_refused():
    models = tiny_models(2)
    models[1].train()
    with pytest.raises(ValueError, match="expected models in eval mode, found train mode"):
        ensemble.build("vmap", models, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cuda_path_has_the_right_device_dtype_and_shape_under_fake_tensors(
    name: str, per_model: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    # functorch copies modules deeply, and with a fake tensor goes a copy of its whole mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode(), torch.device("cuda"):
        template = torchvision.models.resnet18(num_classes=7).eval()
        models = stacking.allocate(template, 3, device=torch.device("cuda"), dtype=dtype)
        x = torch.empty((3, 2, 3, 64, 64) if per_model else (2, 3, 64, 64), dtype=dtype)
        logits = ensemble.build(name, models, x)(x)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (3, 2, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_logits_on_cuda_are_those_of_the_cpu(name: str):
    models, x = tiny_models(3), torch.randn(2, 3, 8, 8)
    expected = independent(models, x)
    found = ensemble.build(name, [model.cuda() for model in models], x.cuda())(x.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
