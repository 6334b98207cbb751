"""The measured limits of a device, and the work that a row asks for."""

from collections.abc import Callable

import pytest
import torch

from ensemble.bench import roofline
from ensemble.bench.roofline import (
    Limits,
    Work,
    measure_limits,
    work,
)
from ensemble.models.vision import torchvision


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
