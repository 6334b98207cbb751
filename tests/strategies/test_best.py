"""`best`: selection of the fastest candidate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
from ensemble import strategies
from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
)
from ensemble.models.vision import torchvision
from ensemble.strategies import STRATEGIES, Strategy, agreement, best
from ensemble.strategies.agreement import Check
from ensemble.strategies.build_result import Builder, BuildResult
from tests.tiny import TinyNet, independent, tiny_models

PEERS = [name for name, strategy in STRATEGIES.items() if strategy.module == "peers"]


@dataclass(frozen=True)
class FakeStrategy(Strategy):
    """A strategy defined by a test."""

    build: Builder | None = None

    def builder(self, *, tune_seconds: float = 0.0) -> Builder:
        assert self.build is not None
        return self.build


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers the test's own strategies and makes them the candidates."""

    def install(**builders: Builder) -> None:
        for name, build in builders.items():
            monkeypatch.setitem(STRATEGIES, name, FakeStrategy("", "", "for a test", build=build))
        monkeypatch.setitem(best.CANDIDATES, "cpu", ("loop", *builders))

    return install


def sleeping(seconds: float, off: float = 0.0) -> Builder:
    """A builder: the logits of the models plus `off`, after `seconds`."""

    def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        def forward(x: Tensor) -> Tensor:
            time.sleep(seconds)
            return torch.stack([model(x) for model in models]) + off

        return BuildResult(forward, f"sleeps {seconds} s")

    return build


@pytest.mark.parametrize("names", [*best.CANDIDATES.values(), best.OTHER_DEVICES])
def test_candidates_are_strategies_without_peers_and_start_with_the_loop(
    names: tuple[str, ...],
) -> None:
    assert set(names) <= set(STRATEGIES) - {"best", *PEERS}
    assert names[0] == "loop"
    assert len(set(names)) == len(names) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_best_runs_in_every_dtype(dtype: torch.dtype) -> None:
    models = [model.to(dtype) for model in tiny_models(2)]
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    assert ensemble.build("best", models, x)(x).dtype == dtype


def test_the_fastest_is_selected_and_the_note_lists_the_candidates(
    candidates: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates(slow=sleeping(0.05), fast=sleeping(0.01))
    monkeypatch.setitem(
        best.CANDIDATES, "cpu", ("slow", "fast")
    )  # without the loop, which would win
    models, x = tiny_models(2), torch.randn(1, 3, 8, 8)
    built = strategies.build_unverified("best", models, x)
    assert built.choice is not None
    assert built.choice.name == "fast"
    assert built.choice.tried.startswith("slow ")
    assert built.note == "sleeps 0.01 s"
    assert 0.1 < built.choice.seconds < 5
    torch.testing.assert_close(built.forward(x), independent(models, x))


def test_if_nothing_is_faster_the_loop_is_selected(candidates: Callable[..., None]) -> None:
    candidates(slow=sleeping(0.01))
    built = strategies.build_unverified("best", tiny_models(2), torch.randn(1, 3, 8, 8))
    assert built.choice is not None
    assert built.choice.name == "loop"


def test_a_fast_but_wrong_candidate_is_rejected(candidates: Callable[..., None]) -> None:
    def wrong(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        return BuildResult(lambda x: torch.zeros(len(models), len(x), 5))

    candidates(wrong=wrong)
    models = tiny_models(2)
    for x in (torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)):
        built = strategies.build_unverified("best", models, x)
        assert built.choice is not None
        assert built.choice.name == "loop"
        assert "wrong: outputs disagree: model 0 has an error of 1.0e+00" in built.choice.tried


def test_out_of_memory_only_rejects_the_candidate(candidates: Callable[..., None]) -> None:
    def greedy(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        raise torch.OutOfMemoryError("no room for 1 TB")

    candidates(greedy=greedy)
    built = strategies.build_unverified("best", tiny_models(2), torch.randn(1, 3, 8, 8))
    assert built.choice is not None
    assert built.choice.tried == "greedy: no room for 1 TB"


def test_an_untraceable_model_is_run_by_a_strategy_without_tracing() -> None:
    class Branching(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    models: list[nn.Module] = [Branching().eval() for _ in range(2)]
    x = torch.randn(1, 3, 8, 8)
    built = strategies.build_unverified("best", models, x)
    assert built.choice is not None
    assert built.choice.name in ("loop", "concurrent", "folded_vmap")
    assert (
        "lowered_vmap: torch cannot trace this model: its code asks for values that"
        in built.choice.tried
    )
    torch.testing.assert_close(built.forward(x), independent(models, x))


def test_models_of_different_architectures_are_supported() -> None:
    models: list[nn.Module] = [
        *tiny_models(1),
        torchvision.models.squeezenet1_1(num_classes=5).eval(),
    ]
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        ensemble.build("best", models, x)(x), independent(models, x), rtol=1e-4, atol=1e-5
    )


def test_segmentation_outputs_are_checked_and_supported() -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
        for _ in range(2)
    ]
    x = torch.randn(2, 3, 20, 20)
    built = strategies.build_unverified("best", models, x)
    assert built.choice is not None
    assert "lowered_vmap" in built.choice.tried
    assert "disagree" not in built.choice.tried
    expected = independent(models, x)
    assert expected.shape == (2, 2, 5, 20, 20)
    torch.testing.assert_close(built.forward(x), expected, rtol=1e-4, atol=1e-4)


def test_best_supports_resnets_built_from_a_blank_example() -> None:
    torch.manual_seed(0)
    models = [torchvision.models.resnet18(num_classes=7).eval() for _ in range(2)]
    built = strategies.build_unverified("best", models, torch.zeros(1, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built.forward(x), independent(models, x), rtol=1e-4, atol=1e-4)


class Noted(TinyNet):
    """Notes in which precision CUDA multiplies while it runs."""

    seen: ClassVar[list[Float32Precision]] = []

    def forward(self, x: Tensor) -> Tensor:
        Noted.seen.append(current_float32_precision())
        return super().forward(x)


@pytest.mark.parametrize("of_caller", list(Float32Precision))
def test_on_cuda_the_reference_is_ieees_and_the_candidates_are_judged_by_the_callers_precision(
    of_caller: Float32Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default lets cuDNN convolve in TF32: 3e-4 off is then no disagreement."""
    Noted.seen.clear()
    limits = list[float]()
    agrees = Check(0.0, None, None, None)

    def noted(*_: Tensor, tolerance: float, nan_agrees: bool, has_classes: bool) -> Check:
        limits.append(tolerance)
        return agrees

    monkeypatch.setattr(agreement, "check", noted)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode(), torch.device("cuda"), float32_precision(of_caller):
        models = [Noted().eval().requires_grad_(False) for _ in range(2)]
        x = torch.empty(1, 3, 8, 8)
        check = best._checker(models, x)
        assert Noted.seen == [Float32Precision.IEEE] * 2
        Noted.seen.clear()
        check(torch.stack([model(x) for model in models]))
        assert Noted.seen == [of_caller] * 2
    assert limits == [1e-3 if of_caller is Float32Precision.TF32 else 1e-4]


def test_the_reference_on_the_cpu_leaves_the_flags_of_cuda_alone() -> None:
    Noted.seen.clear()
    models = [Noted().eval().requires_grad_(False) for _ in range(2)]
    with float32_precision(Float32Precision.TF32):
        best._checker(models, torch.randn(1, 3, 8, 8))
    assert Noted.seen == [Float32Precision.TF32] * 2
