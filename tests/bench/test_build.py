"""What a strategy's start costs, and under which precision of float32 products it is built."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.bench.build import at_shape, build
from ensemble.compiler import kernels
from ensemble.errors import UnavailableError
from ensemble.machine import memory
from ensemble.machine.dtypes import FLOAT32, numeric_format
from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
)
from ensemble.models import stacking
from ensemble.strategies import Strategy
from ensemble.strategies.build_result import BuildResult
from tests.tiny import tiny_models


def test_compiling_the_kernels_is_in_no_strategys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[float] = []

    def load() -> None:
        if not compiled:
            begin = time.perf_counter()
            time.sleep(0.5)
            compiled.append(time.perf_counter() - begin)

    kernels.load()
    monkeypatch.setattr(kernels, "load", load)
    begin = time.perf_counter()
    started = build("lowered_vmap", tiny_models(2), torch.randn(1, 3, 8, 8), FLOAT32)
    took = time.perf_counter() - begin
    assert compiled
    assert started.build_s + started.first_call_s < took - compiled[0]


@pytest.mark.parametrize("of_caller", list(Float32Precision))
@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_a_strategy_is_built_under_its_own_precision_and_that_of_the_caller_is_restored(
    name: str, of_caller: Float32Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Float32Precision] = []

    def notes_flags(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        def forward(x: Tensor) -> Tensor:
            found.append(current_float32_precision())
            return torch.stack([model(x) for model in models])

        forward(example)
        return BuildResult(forward)

    monkeypatch.setattr(Strategy, "builder", lambda self, **_: notes_flags)
    monkeypatch.setitem(strategies.STRATEGIES, "notes", Strategy("eager", "loop", "notes"))
    monkeypatch.setattr("ensemble.bench.build.check_supported", lambda numbers, device: None)
    numbers, models = numeric_format(name), tiny_models(2)
    with float32_precision(of_caller):
        built = build("notes", models, torch.randn(1, 3, 8, 8), numbers)
        assert current_float32_precision() is of_caller
    expected = Float32Precision.TF32 if name == "tf32" else Float32Precision.IEEE
    assert found == [expected] * 3  # the build, the first call, the second
    assert built.numbers == numbers
    assert built.example.dtype == built.logits.dtype == numbers.dtype


def test_a_strategy_is_prepared_for_another_shape_under_its_own_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Float32Precision] = []

    def notes_flags(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        found.append(current_float32_precision())
        return BuildResult(lambda x: torch.stack([model(x) for model in models]))

    monkeypatch.setattr(Strategy, "builder", lambda self, **_: notes_flags)
    monkeypatch.setitem(strategies.STRATEGIES, "notes", Strategy("eager", "loop", "notes"))
    monkeypatch.setattr("ensemble.bench.build.check_supported", lambda numbers, device: None)
    models, x = tiny_models(2), torch.randn(4, 3, 8, 8)
    with float32_precision(Float32Precision.IEEE):
        built = build("notes", models, x, numeric_format("tf32"))
        found.clear()
        smaller = at_shape(built, x[:3])
        assert current_float32_precision() is Float32Precision.IEEE
    assert found == [Float32Precision.TF32]
    assert torch.equal(smaller.logits, torch.stack([model(x[:3]) for model in models]))
    assert smaller.example.shape == (3, 3, 8, 8)
    assert smaller.call().shape == (2, 3, 5)


@pytest.mark.parametrize("name", ["loop", "vmap", "lowered_vmap"])
def test_a_build_has_the_memory_that_is_held_and_that_of_a_model(name: str) -> None:
    models = tiny_models(2)
    built = build(name, models, torch.randn(1, 3, 8, 8), FLOAT32)
    assert built.held_bytes is not None
    assert built.bytes_per_model is not None
    if name == "lowered_vmap":  # batch norm is folded, channels are padded, the arenas are held
        assert 2 * built.bytes_per_model < built.held_bytes
    else:
        size = sum(map(stacking.weight_bytes, models))
        assert (built.held_bytes, built.bytes_per_model) == (size, size // 2)


def test_tf32_is_not_built_on_a_cpu() -> None:
    with pytest.raises(UnavailableError, match="tf32 requires a CUDA device, got cpu"):
        build("loop", tiny_models(2), torch.randn(1, 3, 8, 8), numeric_format("tf32"))


def test_the_reserved_peak_of_a_build_includes_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reserved_bytes", lambda device: 1000)
    monkeypatch.setattr(memory, "peak_reserved_bytes", lambda device: 5000)
    models = tiny_models(2)
    built = build("loop", models, torch.randn(1, 3, 8, 8), FLOAT32)
    assert built.peak_reserved_bytes == 4000 + sum(map(stacking.weight_bytes, models))
    monkeypatch.undo()
    assert build("loop", models, torch.randn(1, 3, 8, 8), FLOAT32).peak_reserved_bytes is None
