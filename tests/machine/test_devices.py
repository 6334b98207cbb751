"""Device selection and numeric settings."""

import os

import pytest
import torch

from ensemble.bench import environment
from ensemble.machine import devices


def test_auto_selects_the_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    assert devices.select_device("auto") == cuda


def test_an_unavailable_device_index_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert devices.select_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [1]
    with pytest.raises(ValueError, match=r"\(cpu, cuda:0, cuda:1\), got 'cuda:2'"):
        devices.select_device("cuda:2")


def test_tf32_is_disabled() -> None:
    devices.configure(threads=None)
    described = environment.describe(
        torch.device("cpu"), allocator="system", weights="none", first_forward_s=0.1
    )
    assert described.tf32 is False
    assert described.cores == os.cpu_count()
