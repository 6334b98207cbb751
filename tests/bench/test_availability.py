"""What a run says before it begins, and the rows that no process is started for."""

from __future__ import annotations

import pytest
import torch

from ensemble.bench import availability
from ensemble.bench.case import Case
from ensemble.bench.config import Config, RunOptions
from ensemble.machine import dtypes
from ensemble.machine.dtypes import numeric_format
from ensemble.strategies import STRATEGIES, best
from tests.made import CONFIG, with_options

CPU = torch.device("cpu")


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 alone, as one of them was measured."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(dtypes, "slowdown", lambda dtype: 4.5)


def config(*strategies: str, dtype: str = "bfloat16") -> Config:
    return with_options(CONFIG, strategies=strategies, dtype=(dtype,))


def unavailable(asked: Config) -> dict[str, str | None]:
    found = availability.unavailable(asked.plan(), asked, CPU)
    return {row.case.strategy: row.error for row in found}


@pytest.mark.usefixtures("no_bfloat16")
def test_a_dtype_that_the_cpu_emulates_is_warned_of_and_skipped_unless_named() -> None:
    named = config("loop", "best", "openvino", "onnxruntime")
    assert unavailable(named) == {
        "openvino": "OpenVINO does not support torch.bfloat16 on this CPU",
        "onnxruntime": "ONNX Runtime has no CPU convolution in torch.bfloat16",
    }
    (line,) = availability.warnings(named.plan(), CPU)
    assert line.startswith("Warning: this CPU emulates bfloat16: a convolution")
    assert "took 4.5 times as long as in float32" in line
    every = config(*STRATEGIES)
    skipped = unavailable(every)
    assert skipped["concurrent"] == (
        "the CPU emulates bfloat16: it cannot win; --strategies concurrent measures it"
    )
    assert {"best", "lowered_vmap"}.isdisjoint(skipped)
    assert availability.warnings(config("best").plan(), CPU) == []


def test_what_the_cpu_computes_in_is_neither_warned_of_nor_skipped() -> None:
    every = config(*STRATEGIES, dtype="float32")
    on_cuda = {name for name, strategy in STRATEGIES.items() if "CUDA" in strategy.requires[:4]}
    assert set(unavailable(every)) == on_cuda
    assert availability.warnings(every.plan(), CPU) == []


def test_rows_that_need_cuda_are_skipped_on_a_cpu_only() -> None:
    asked = config("loop", "cudagraph_loop", dtype="float32")
    assert unavailable(asked) == {"cudagraph_loop": "CUDA graphs require a CUDA device, got cpu"}
    assert availability.unavailable(asked.plan(), asked, torch.device("cuda")) == []


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", {"openvino": "openvino supports only the CPU here, got cuda:0"}),
        (
            "bfloat16",
            {
                "openvino": "openvino supports only the CPU here, got cuda:0",
                "onnxruntime": "ONNX Runtime has no CUDA max pooling in torch.bfloat16",
            },
        ),
    ],
)
def test_a_runtime_is_skipped_on_devices_and_in_dtypes_that_it_does_not_support(
    dtype: str, expected: dict[str, str]
) -> None:
    asked = config(*STRATEGIES, dtype=dtype)
    found = availability.unavailable(asked.plan(), asked, torch.device("cuda:0"))
    assert {row.case.strategy: row.error for row in found} == expected
    (row,) = availability.unavailable(config("tensorrt").plan(), config("tensorrt"), CPU)
    assert row.error == "tensorrt supports only CUDA here, got cpu"


@pytest.mark.usefixtures("no_bfloat16")
def test_best_tries_what_computes_in_float32_where_a_dtype_is_emulated() -> None:
    assert best.candidates(CPU, torch.bfloat16) == ("loop", "lowered_vmap")
    assert len(best.candidates(CPU, torch.float32)) > 4


@pytest.mark.skipif(
    not dtypes.is_emulated(torch.float16, CPU), reason="this CPU computes in float16"
)
def test_an_emulated_dtype_is_slower() -> None:
    assert dtypes.slowdown(torch.float16) > 1.5


def test_float32_and_accelerators_are_not_emulated() -> None:
    assert not dtypes.is_emulated(torch.float32, CPU)
    assert not dtypes.is_emulated(torch.bfloat16, torch.device("cuda"))


def test_a_case_of_the_self_check_is_no_strategy() -> None:
    case = Case("self-check", 2, 1, 32, "float32", "shared")
    assert availability.unavailable([case], CONFIG, CPU) == []


def test_rows_in_tf32_are_skipped_on_a_cpu_only() -> None:
    asked = config("loop", "vmap", dtype="tf32")
    assert unavailable(asked) == dict.fromkeys(
        ("loop", "vmap"), "tf32 requires a CUDA device, got cpu"
    )
    assert availability.unavailable(asked.plan(), asked, torch.device("cuda")) == []


def test_every_choice_of_dtype_is_a_numeric_format_and_the_default_is_the_reference() -> None:
    choices = RunOptions.__dataclass_fields__["dtype"].metadata["choices"]
    assert [numeric_format(name).name for name in choices] == list(choices)
    assert RunOptions().dtype == ("float32",)
