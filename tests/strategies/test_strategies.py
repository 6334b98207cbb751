"""Every strategy of the registry returns the logits of separate calls of the models."""

import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import functorch
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
from ensemble import strategies
from ensemble.errors import UnavailableError
from ensemble.machine import devices
from ensemble.models import stacking
from ensemble.models.vision import torchvision
from ensemble.strategies import BEST, STRATEGIES
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.concurrent import partition
from tests.checkpoints import lively
from tests.marks import some_slow
from tests.tiny import TinyNet, independent, tiny_models

ROOT = Path(__file__).parents[2]
SHAPES = {"shared": (2, 3, 8, 8), "per_model": (3, 2, 3, 8, 8)}
PEERS = [name for name, strategy in STRATEGIES.items() if strategy.module == "peers"]
EXPORTED = [name for name, strategy in STRATEGIES.items() if strategy.module == "exported"]
QUIET = pytest.mark.filterwarnings("ignore")  # of third-party packages
QUIETER_COMPILER = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch.compile


def takes_seconds(name: str) -> bool:
    return name in (*PEERS, *EXPORTED) or "compiled" in name or name == BEST


def from_registry(*, slow: bool) -> list[object]:
    """All strategies as test parameters, without those that take seconds unless `slow`."""
    return [
        pytest.param(name, marks=QUIET if name in (*PEERS, *EXPORTED) else QUIETER_COMPILER)
        if takes_seconds(name)
        else name
        for name in STRATEGIES
        if slow or not takes_seconds(name)
    ]


@lru_cache(maxsize=1)
def resnets(arch: str) -> list[nn.Module]:
    """Two models, read-only."""
    return [lively(arch, seed).requires_grad_(False) for seed in range(2)]


def built(name: str, models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """The built strategy, newly compiled; skips the test if it is unavailable here."""
    torch.compiler.reset()
    try:
        return strategies.build_unverified(name, models, example)
    except UnavailableError as error:
        pytest.skip(str(error))


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of any model, relative to its largest logit."""
    errors = (found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    return float(errors.max())


@pytest.mark.parametrize("name", from_registry(slow=True))
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_separate_calls_of_the_models(name: str, shape: str) -> None:
    models = tiny_models(3)
    example, x = torch.randn(2, *SHAPES[shape], generator=torch.Generator().manual_seed(1))
    forward = built(name, models, example).forward
    assert largest_error(forward(x), independent(models, x)) < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        assert largest_error(forward(example), independent(models, example)) < 1e-5


@pytest.mark.parametrize("name", from_registry(slow=False))
def test_a_single_model_is_an_ensemble(name: str) -> None:
    models, x = tiny_models(1), torch.randn(2, 3, 8, 8)
    assert largest_error(built(name, models, x).forward(x), independent(models, x)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        *from_registry(slow=False),
        # The other peers run small nets too, in the tests above.
        *(
            pytest.param(name, marks=[QUIET] if name == "jax" else [QUIET, pytest.mark.slow])
            for name in PEERS
        ),
    ],
)
@pytest.mark.parametrize(
    ("arch", "per_model"),
    some_slow([("resnet18", True), ("resnet50", False)], quick=1),
)
def test_logits_of_resnets_match_separate_calls(name: str, arch: str, per_model: bool) -> None:
    models = resnets(arch)
    x = torch.randn((2, 1, 3, 32, 32) if per_model else (1, 3, 32, 32))
    made = built(name, models, x)
    assert largest_error(made.forward(x), independent(models, x)) < 1e-5
    if name in PEERS:
        assert made.note.startswith("setting: ")


@pytest.mark.parametrize(
    ("name", "arch"),
    some_slow(
        [
            ("vmap", "resnet34"),
            *product(("vmap", "folded_vmap"), ("resnet101", "resnet152")),
        ],
        quick=1,
    ),
)
def test_logits_of_every_resnet_depth_match_separate_calls(name: str, arch: str) -> None:
    models, x = resnets(arch), torch.randn(1, 3, 32, 32)
    assert largest_error(ensemble.build(name, models, x)(x), independent(models, x)) < 1e-5


@pytest.mark.parametrize("name", from_registry(slow=False))
def test_outputs_do_not_require_grad(name: str) -> None:
    models, x = tiny_models(2), torch.randn(1, 3, 8, 8)
    for model in models:
        model.requires_grad_(True)
    assert not built(name, models, x).forward(x).requires_grad


@pytest.mark.parametrize("name", from_registry(slow=True))
@pytest.mark.parametrize("separate", [True, False])
def test_ensembles_of_the_same_models_are_independent(name: str, separate: bool) -> None:
    if takes_seconds(name) and not separate:
        pytest.skip("slow strategies are only tested with separate models")
    models, x = tiny_models(3), torch.randn(2, 3, 8, 8)
    if not separate:
        slices = stacking.allocate(TinyNet(), 3, device=torch.device("cpu"))
        for model, source in zip(slices, models, strict=True):
            model.load_state_dict(source.state_dict())
        models = slices
    before = [{n: t.data_ptr() for n, t in model.state_dict().items()} for model in models]
    orders = [[0, 1, 2]]
    orders += [[2, 0]] if takes_seconds(name) else [[2, 1, 0], [1, 2], [1], [0, 2], [1, 1, 0]]
    ensembles = [(order, built(name, [models[i] for i in order], x).forward) for order in orders]
    for order, forward in ensembles:
        expected = independent([models[index] for index in order], x)
        assert largest_error(forward(x), expected) < 1e-5
    assert [{n: t.data_ptr() for n, t in m.state_dict().items()} for m in models] == before


@pytest.mark.slow  # as the operators themselves, in test_prepacking
def test_prepacked_can_be_the_first_strategy_of_a_process() -> None:
    """Its operators are registered by its own imports, not by those of another strategy."""
    command = [sys.executable, "-c", "import ensemble.strategies.prepacked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*[name for name in PEERS if name != "tensorrt"], "exported_onnx"])
def test_a_missing_runtime_is_reported_with_install_advice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr("ensemble.strategies.peer_conversion.import_module", missing)
    advice = r"is not installed: pip install -r requirements-peers.txt"
    with pytest.raises(UnavailableError, match=advice):
        ensemble.build(name, tiny_models(1), torch.randn(1, 3, 8, 8))


def test_jax_supports_resnets_only() -> None:
    pytest.importorskip("jax", reason="pip install -r requirements-peers.txt")
    with pytest.raises(UnavailableError, match="jax requires a torchvision ResNet, got TinyNet"):
        ensemble.build("jax", tiny_models(1), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith("cudagraph")])
def test_cuda_graphs_are_unavailable_on_other_devices(name: str) -> None:
    with pytest.raises(UnavailableError, match="CUDA graphs require a CUDA device, got cpu"):
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
def test_models_are_balanced_over_the_cores(
    num_models: int, cores: int, plan: list[tuple[list[int], int]]
) -> None:
    assert partition(num_models, cores) == plan


def test_vmap_aliases_the_models_memory() -> None:
    models = stacking.allocate(TinyNet(), 2, device=torch.device("cpu"))
    for model, source in zip(models, tiny_models(2), strict=True):
        model.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 8, 8)
    forward = ensemble.build("vmap", models, x)
    models[1].fc.bias.fill_(100.0)  # type: ignore[union-attr, operator]
    assert bool((forward(x)[1] > 50).all())
    assert bool((forward(x)[0] < 50).all())


def test_vmap_without_combine_state_for_ensemble_is_equivalent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, x = tiny_models(3), torch.randn(2, 3, 8, 8)
    expected = ensemble.build("vmap", models, x)(x)
    monkeypatch.delattr(functorch, "combine_state_for_ensemble")
    torch.testing.assert_close(ensemble.build("vmap", models, x)(x), expected, rtol=0, atol=0)


def test_an_unknown_strategy_is_rejected_with_the_list_of_strategies() -> None:
    with pytest.raises(ValueError, match=r"expected a strategy of loop, vmap.*got 'magic'"):
        ensemble.build("magic", tiny_models(1), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(3, 8, 8), r"example: expected shape \(B, channels, H, W\).*\(3, 8, 8\)"),
        (torch.zeros(3, 1, 3, 8, 8), r"or \(2, B, channels, H, W\), got \(3, 1, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"expected at least one image, got shape \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8).half(), "example: expected torch.float32 on cpu, like model 0"),
    ],
)
def test_an_example_that_does_not_match_the_models_is_rejected(
    example: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble.build("loop", tiny_models(2), example)


def test_a_single_module_is_rejected_and_an_iterator_is_accepted() -> None:
    models, x = tiny_models(2), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="expected a list of modules, got one TinyNet"):
        ensemble.build("vmap", models[0], x)  # type: ignore[arg-type]
    forward = ensemble.build("loop", iter(models), x)  # type: ignore[arg-type]
    torch.testing.assert_close(forward(x), independent(models, x))


def test_a_model_that_does_not_return_a_single_tensor_is_rejected() -> None:
    class Wrapped(TinyNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    x = torch.randn(1, 3, 8, 8)
    models: list[nn.Module] = [Wrapped().eval()]
    for name in ("loop", BEST):
        with pytest.raises(ValueError, match="expected one tensor from each model, got dict"):
            ensemble.build(name, models, x)(x)


def test_models_in_train_mode_are_rejected() -> None:
    models = tiny_models(2)
    models[1].train()
    with pytest.raises(ValueError, match="expected eval mode, but model 1 is in train mode"):
        ensemble.build("vmap", models, torch.zeros(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*batching rule")  # as_strided_, in a channels-last mean
@pytest.mark.parametrize("name", ["loop", "vmap", "folded_loop", "folded_vmap"])
@pytest.mark.parametrize(
    ("dtype", "per_model"),
    some_slow(
        [
            *((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)),
            *((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)),
        ],
        quick=2,
    ),
)
def test_the_cuda_path_has_the_right_device_dtype_and_shape_under_fake_tensors(
    name: str, dtype: torch.dtype, per_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # functorch deep-copies modules, and a fake tensor would deep-copy its mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode(), torch.device("cuda"):
        block = torchvision.models.resnet.BasicBlock
        template = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=7).eval()
        models = stacking.allocate(template, 2, device=torch.device("cuda"), dtype=dtype)
        x = torch.empty((2, 3, 3, 64, 64) if per_model else (3, 3, 64, 64), dtype=dtype)
        logits = ensemble.build(name, models, x)(x)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (2, 3, 7))


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.filterwarnings("ignore:.*TensorFloat32")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_logits_on_cuda_match_the_cpu_in_every_call(name: str) -> None:
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
        with torch.inference_mode():  # overwrites freed memory
            torch.full((2**26,), float("nan"), device="cuda")
            _ = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(400)]
