"""CUDA graphs of strategies: the settings that are tried. Without a GPU the capture is left out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.machine import cuda_graphs
from ensemble.machine.memory import is_out_of_memory
from ensemble.strategies import STRATEGIES, cudagraph
from tests.tiny import independent, tiny_models

NAMES = ["cudagraph_loop", "cudagraph_vmap"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Captures:
    """In place of captures: whether cuDNN's benchmark was on in each, the thread, and the memory
    format of the images that the convolutions got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.benchmark: list[bool] = []
        self.threads: list[int] = []
        self.is_channels_last: list[bool] = []
        self.fails_at: int | None = None
        self.error: Exception = RuntimeError("no such algorithm")
        monkeypatch.setattr(cudagraph, "_require_cuda", lambda example: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(cuda_graphs, "graphed", self.graphed)

    def graphed(self, function: Callable[[Tensor], Tensor], x: Tensor, *, warmup: int) -> Any:
        self.benchmark.append(torch.backends.cudnn.benchmark)
        self.threads.append(threading.get_ident())
        assert torch.is_inference_mode_enabled()
        formats: list[bool] = []
        convolve = nn.Conv2d.forward

        def noted(module: nn.Conv2d, images: Tensor) -> Tensor:
            formats.append(module.weight.stride(1) == 1)
            return convolve(module, images)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", noted)
            function(x)
        self.is_channels_last.append(all(formats))
        if len(self.benchmark) == self.fails_at:
            raise self.error
        return function


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_model", [False, True])
def test_both_memory_formats_are_captured_without_and_with_cudnns_benchmark(
    name: str, per_model: bool, captures: Captures
) -> None:
    models = tiny_models(2)
    x = torch.randn(*((2,) if per_model else ()), 3, 3, 8, 8)
    built = strategies.build_unverified(name, models, x)
    assert captures.benchmark == [False, False, True, True]
    assert captures.is_channels_last == [True, False, True, False]
    assert not torch.backends.cudnn.benchmark
    found = built.note.removeprefix("fastest setting: ")
    assert found in cudagraph.SETTINGS
    for setting in cudagraph.SETTINGS:
        assert f"{setting} " in built.details
    torch.testing.assert_close(built.forward(x), independent(models, x), rtol=1e-4, atol=1e-5)


def test_cudnns_benchmark_runs_in_a_thread_without_cached_algorithms(captures: Captures) -> None:
    strategies.build_unverified("cudagraph_vmap", tiny_models(2), torch.randn(3, 3, 8, 8))
    here = threading.get_ident()
    assert [thread == here for thread in captures.threads] == [True, True, False, False]


def test_the_flag_of_cudnns_benchmark_is_restored_after_an_error(captures: Captures) -> None:
    captures.fails_at = 3
    built = strategies.build_unverified("cudagraph_loop", tiny_models(2), torch.randn(3, 3, 8, 8))
    assert not torch.backends.cudnn.benchmark
    assert "channels-last, cudnn.benchmark: no such algorithm" in built.details


def test_a_capture_without_memory_is_out_of_memory(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures.fails_at, captures.error = 1, RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(cudagraph, "SETTINGS", dict([*cudagraph.SETTINGS.items()][:1]))
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        strategies.build_unverified("cudagraph_loop", tiny_models(2), torch.randn(3, 3, 8, 8))
    assert is_out_of_memory(caught.value)


def test_operators_without_a_batching_rule_stay_in_the_note(captures: Captures) -> None:
    class Renormalized(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.renorm(self[0](x), 2, 0, 1.0).flatten(1)

    models = [Renormalized(nn.Conv2d(3, 4, 3)).eval().requires_grad_(False) for _ in range(2)]
    built = strategies.build_unverified("cudagraph_vmap", models, torch.randn(3, 3, 8, 8))
    assert "no batching rule for aten::renorm" in built.deferred_note()


@NEEDS_CUDA
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_gives_the_logits_of_the_models_on_cuda(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_models(3)
    x = torch.randn(2, 3, 32, 32)
    expected = independent(models, x)
    on_cuda = [model.cuda() for model in models]
    for setting, values in cudagraph.SETTINGS.items():
        monkeypatch.setattr(cudagraph, "SETTINGS", {setting: values})
        built = strategies.build_unverified(name, on_cuda, x.cuda())
        assert built.note == f"fastest setting: {setting}"
        found = built.forward(x.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # TF32 by default


@NEEDS_CUDA
def test_best_on_cuda_does_not_reject_candidates_for_torchs_default_precision() -> None:
    models = [model.cuda() for model in tiny_models(3)]
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        built = strategies.build_unverified("best", models, x)
    assert built.choice is not None
    assert "disagree" not in built.choice.tried


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", [n for n in STRATEGIES if STRATEGIES[n].module == "cudagraph"])
def test_graphs_of_the_second_device_are_captured_and_replayed_there(name: str) -> None:
    models = tiny_models(3)
    x = torch.randn(2, 3, 32, 32)
    expected = independent(models, x)
    forward = strategies.build_unverified(
        name, [model.to("cuda:1") for model in models], x.to("cuda:1")
    ).forward
    assert torch.cuda.current_device() == 0
    found = forward(x.to("cuda:1"))
    assert found.device == torch.device("cuda:1")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
