"""The measured limits of a device, and the work that a row asks for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble.bench import roofline
from ensemble.bench.case import Case
from ensemble.bench.roofline import (
    Limits,
    Work,
    measure_limits,
    work,
)
from ensemble.bench.workload import Workload
from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
)
from ensemble.models.vision import torchvision
from tests.made import CASE
from tests.tiny import tiny_models


def test_the_operations_of_a_resnet18_are_those_of_its_paper() -> None:
    # He et al., Deep Residual Learning, table 1: 1.8e9 multiply-adds at 224 px.
    model = torchvision.models.resnet18()
    found = work(model, 3, torch.zeros(2, 3, 224, 224), torch.float32)
    assert found.operations == pytest.approx(3 * 2 * 2 * 1.8e9, rel=0.02)
    assert found.bytes == pytest.approx(3 * 46.8e6 + 2 * 3 * 224 * 224 * 4, rel=0.01)


def test_bytes_follow_the_dtype() -> None:
    model, x = torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64)
    wide, narrow = (work(model, 1, x, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.bytes == 2 * narrow.bytes
    assert wide.operations == narrow.operations


def test_the_slower_of_the_two_limits_binds() -> None:
    limits = Limits(operations_per_s=100.0, bytes_per_s=10.0)
    assert Work(200.0, 10.0).least_seconds(limits) == (2.0, "compute")
    assert Work(200.0, 30.0).least_seconds(limits) == (3.0, "memory")


def test_the_limits_of_this_machine_are_between_a_toy_and_a_cluster() -> None:
    found = measure_limits(torch.device("cpu"), torch.float32, read_bytes=64 * 2**20)
    assert 1e9 < found.operations_per_s < 1e15
    assert 1e8 < found.bytes_per_s < 1e13


class Processor:
    """A clock that products of a made-up processor move on; it reads memory in no time."""

    def __init__(self, operations_per_s: float) -> None:
        self.rate, self.now, self.sides = operations_per_s, 0.0, list[int]()

    def clock(self) -> float:
        self.now += 1e-6  # what asking takes: no call is free
        return self.now

    def product(self, side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
        def call() -> None:
            self.now += 2 * side**3 / self.rate
            self.sides.append(side)

        return call


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rate", [2e9, 2e10, 2e11, 2e12, 1e15])
def test_the_limit_is_found_in_seconds_on_a_slow_processor_and_on_a_fast_one(
    rate: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor(rate)
    monkeypatch.setattr(roofline, "_product", processor.product)
    monkeypatch.setattr(roofline, "synchronize", lambda device: None)
    found = measure_limits(
        torch.device(device), torch.float16, read_bytes=64, clock=processor.clock
    )
    assert processor.now < 2.5 * roofline.BUDGET_S
    assert found.operations_per_s == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize(("device", "side"), [("cpu", 2048), ("meta", 8192)])
def test_a_processor_of_usual_speed_is_measured_with_the_largest_matrix(
    device: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor(1e11 if device == "cpu" else 1e13)
    monkeypatch.setattr(roofline, "_product", processor.product)
    monkeypatch.setattr(roofline, "synchronize", lambda device: None)
    measure_limits(torch.device(device), torch.float32, read_bytes=64, clock=processor.clock)
    assert processor.sides[-1] == side
    assert processor.sides.count(side) > roofline.LEAST_CALLS


class Gpu:
    """A CUDA device under fake tensors: its stream takes made-up times, which events record; the
    host's clock runs faster, by what launches and synchronizations take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cache_bytes: int) -> None:
        self.stream_s = self.host_s = 0.0
        gpu = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at_s = gpu.stream_s

            def synchronize(self) -> None:
                gpu.host_s += 20e-6

            def elapsed_time(self, end: Event) -> float:
                return (end.at_s - self.at_s) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(roofline, "synchronize", lambda device: None)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(L2_cache_size=cache_bytes),
        )

    def clock(self) -> float:
        self.host_s += 1e-3
        return self.host_s

    def takes(self, seconds: float) -> None:
        self.stream_s += seconds
        self.host_s += seconds + 10e-6


@pytest.mark.parametrize(
    ("read_s", "copy_s", "expected"),
    [(1.0, 1.5, 2 / 1.5), (1.0, 4.0, 1.0)],  # a copy moves twice the bytes
)
def test_the_bandwidth_of_a_gpu_is_the_best_of_a_read_and_a_copy_on_the_stream(
    read_s: float, copy_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, megabyte = Gpu(monkeypatch, cache_bytes=50 * 2**20), 2**20
    copy = torch.Tensor.copy_

    def sum_of(x: torch.Tensor) -> None:
        gpu.takes(read_s * 1e-3)

    def copied(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        gpu.takes(copy_s * 1e-3)
        return copy(x, source)

    monkeypatch.setattr(torch.Tensor, "sum", sum_of)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(
        roofline, "_product", lambda side, *_: lambda: gpu.takes(2 * side**3 / 1e15)
    )
    with FakeTensorMode():
        found = measure_limits(
            torch.device("cuda"), torch.float32, read_bytes=megabyte, clock=gpu.clock
        )
    assert found.bytes_per_s == pytest.approx(expected * megabyte / 1e-3)
    assert found.operations_per_s == pytest.approx(1e15)
    assert found.cache_bytes == 50 * 2**20


@pytest.mark.parametrize(
    ("bytes_moved", "operations", "cache_bytes", "noted"),
    [
        (40e6, 1e6, 50 * 2**20, True),
        (90e6, 1e6, 50 * 2**20, False),
        (40e6, 1e12, 50 * 2**20, False),  # compute binds
        (40e6, 1e6, None, False),  # a CPU
    ],
)
def test_weights_that_fit_the_l2_cache_are_noted_where_memory_binds(
    bytes_moved: float,
    operations: float,
    cache_bytes: int | None,
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "work", lambda *_: Work(operations, bytes_moved))
    limits = Limits(1e12, 3e12, cache_bytes)
    images = torch.zeros(1, 3, 8, 8)
    workload = Workload(torch.device("cpu"), tiny_models(1), "made up", lambda px: images)
    found = roofline.of_case(CASE, {"float32": (limits, ())}, workload)
    assert found.least_s is not None
    assert (found.note is not None) is noted
    if found.note:
        assert found.note.startswith("weights and input (40 MB) fit the L2 cache (52 MB)")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bandwidth_of_a_real_gpu_is_that_of_its_memory_not_of_its_launches() -> None:
    found = measure_limits(torch.device("cuda"), torch.bfloat16)
    properties = torch.cuda.get_device_properties(0)
    peak = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
    assert 0.7 * peak < found.bytes_per_s < 1.02 * peak
    assert found.cache_bytes == properties.L2_cache_size


def test_the_limits_of_tf32_are_measured_in_tf32_and_those_of_float32_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[torch.dtype, Float32Precision]] = []

    def measured(device: torch.device, dtype: torch.dtype) -> Limits:
        found.append((dtype, current_float32_precision()))
        return Limits(1.0, 1.0)

    monkeypatch.setattr(roofline, "measure_limits", measured)
    cases = [Case("vmap", 2, 1, 224, dtype, "shared") for dtype in ("float32", "tf32")]
    with float32_precision(Float32Precision.IEEE):
        limits = roofline.limits_of(cases, torch.device("cpu"))
    assert list(limits) == ["float32", "tf32"]
    assert found == [
        (torch.float32, Float32Precision.IEEE),
        (torch.float32, Float32Precision.TF32),
    ]
