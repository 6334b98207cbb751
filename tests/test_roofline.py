import pytest
import torch
import torchvision

from ensemble.roofline import Limits, Work, measure, work


def test_the_operations_of_a_resnet18_are_those_of_its_paper():
    # He et al., Deep Residual Learning, table 1: 1.8e9 multiply-adds at 224 px.
    model = torchvision.models.resnet18()
    found = work(model, 3, torch.zeros(2, 3, 224, 224), torch.float32)
    assert found.operations == pytest.approx(3 * 2 * 2 * 1.8e9, rel=0.02)
    assert found.bytes == pytest.approx(3 * 46.8e6 + 2 * 3 * 224 * 224 * 4, rel=0.01)


def test_bytes_follow_the_dtype():
    model, x = torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64)
    wide, narrow = (work(model, 1, x, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.bytes == 2 * narrow.bytes
    assert wide.operations == narrow.operations


def test_the_slower_of_the_two_limits_binds():
    limits = Limits(operations_per_s=100.0, bytes_per_s=10.0)
    assert Work(200.0, 10.0).least_seconds(limits) == (2.0, "compute")
    assert Work(200.0, 30.0).least_seconds(limits) == (3.0, "memory")


def test_the_limits_of_this_machine_are_between_a_toy_and_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("ensemble.roofline.READ_BYTES", 64 * 2**20)
    found = measure(torch.device("cpu"), torch.float32)
    assert 1e9 < found.operations_per_s < 1e15
    assert 1e8 < found.bytes_per_s < 1e13
