from collections.abc import Sequence

import functorch
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
from ensemble import devices, stacking
from ensemble.errors import UnavailableError
from ensemble.strategies import STRATEGIES
from ensemble.strategies.concurrent import shares
from tests.tiny import TinyNet, tiny_models

EAGER = ["loop", "vmap", "folded_loop", "folded_vmap", "concurrent"]
EAGER += ["packed_loop", "packed_concurrent", "winograd_vmap"]
COMPILED = ["compiled_loop", "compiled_vmap", "concurrent_compiled"]
PEERS = {"openvino": "openvino", "onnxruntime": "onnxscript", "jax": "jax"}  # row: package


def independent(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What each model by itself makes of its own input, without any code of `ensemble`."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    with torch.no_grad():
        return torch.stack([model(own) for model, own in zip(models, inputs, strict=True)])


@pytest.mark.parametrize("name", EAGER)
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


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *((name, arch) for name in EAGER for arch in ("resnet18", "resnet50")),
        *(("vmap", arch) for arch in ("resnet34", "resnet101", "resnet152")),
        ("folded_vmap", "resnet152"),
    ],
)
def test_every_depth_of_resnet_gives_the_logits_of_the_models_themselves(name: str, arch: str):
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(torchvision.models.get_model(arch, num_classes=7).eval())
    x = torch.randn(1, 3, 32, 32)
    expected = independent(models, x)
    found = ensemble.build(name, models, x)(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", EAGER)
def test_nothing_is_recorded_for_a_gradient(name: str):
    forward = ensemble.build(name, tiny_models(2), torch.randn(1, 3, 8, 8))
    assert forward(torch.randn(1, 3, 8, 8)).is_inference()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own parts
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 2, 3, 8, 8)], ids=["shared", "per_model"])
def test_compiled_logits_are_those_of_each_model_by_itself(name: str, shape: tuple[int, ...]):
    torch.compiler.reset()
    models = tiny_models(3)
    example, x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = independent(models, x)
    forward = ensemble.build(name, models, example)
    torch.testing.assert_close(forward(x), expected, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(forward(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the packages, not of ours
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("per_model", [False, True])
def test_logits_of_another_runtime_are_those_of_the_models_themselves(name: str, per_model: bool):
    pytest.importorskip(PEERS[name], reason="pip install -r requirements-peers.txt")
    models: list[nn.Module] = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(torchvision.models.resnet50(num_classes=7).eval())
    x = torch.randn((3, 2, 3, 64, 64) if per_model else (2, 3, 64, 64))
    expected = independent(models, x)
    forward = ensemble.build(name, models, x)
    assert float((forward(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert forward.note.startswith("setting: ")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PEERS)
def test_a_runtime_that_is_not_installed_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    def missing(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr("ensemble.strategies.peers.import_module", missing)
    with pytest.raises(UnavailableError, match=r"is not installed: pip install -r requirements-p"):
        ensemble.build(name, tiny_models(1), torch.randn(1, 3, 8, 8))


def test_jax_takes_resnets_only():
    pytest.importorskip("jax", reason="pip install -r requirements-peers.txt")
    with pytest.raises(UnavailableError, match="JAX runs the ResNet family here, not TinyNet"):
        ensemble.build("jax", tiny_models(1), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith("captured")])
def test_cuda_graphs_elsewhere_are_unavailable_with_the_reason(name: str):
    with pytest.raises(UnavailableError, match="CUDA graphs need a CUDA device, this is cpu"):
        ensemble.build(name, tiny_models(1), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("num_models", "cores", "plan"),
    [
        (4, 2, [([0, 2], 1), ([1, 3], 1)]),
        (3, 2, [([0], 1), ([1], 1), ([2], 2)]),
        (1, 2, [([0], 2)]),
        (2, 8, [([0], 4), ([1], 4)]),
        (7, 4, [([0], 1), ([1], 1), ([2], 1), ([3], 1), ([4], 1), ([5], 1), ([6], 1)]),
        (3, 1, [([0, 1, 2], 1)]),
    ],
)
def test_models_are_spread_so_that_no_core_waits_for_long(
    num_models: int, cores: int, plan: list[tuple[list[int], int]]
):
    assert shares(num_models, cores) == plan


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


@pytest.mark.filterwarnings("ignore:.*batching rule")  # as_strided_, of a channels-last mean
@pytest.mark.parametrize("name", ["loop", "vmap", "folded_loop", "folded_vmap"])
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


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.filterwarnings("ignore:.*TensorFloat32")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_logits_on_cuda_are_those_of_the_cpu_at_every_call(name: str):
    devices.configure(threads=None)  # no TF32
    torch.manual_seed(0)
    models = [torchvision.models.resnet18(num_classes=7).eval() for _ in range(3)]
    x = torch.randn(2, 3, 64, 64)
    expected = independent(models, x)
    try:
        forward = ensemble.build(name, [model.cuda() for model in models], x.cuda())
    except UnavailableError as error:
        pytest.skip(str(error))
    for _ in range(3):
        torch.testing.assert_close(forward(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():  # whatever was freed is overwritten
            torch.full((2**26,), float("nan"), device="cuda")
            _ = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(400)]
