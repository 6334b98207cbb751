"""Device selection and numeric settings."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch

from ensemble.bench import environment
from ensemble.errors import InputError
from ensemble.machine import devices, gpu_state
from ensemble.machine.gpu_state import GpuState


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


def with_broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch finds a driver that it cannot use, and warns as `torch.cuda.is_available` does."""

    def current_accelerator(check_available: bool) -> None:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old\n(found version"
            " 11040). (Triggered internally at /c10/cuda/CUDAFunctions.cpp:119.)",
            stacklevel=1,
        )

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)


TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."


def test_auto_falls_back_to_the_cpu_and_says_what_is_wrong_with_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_broken_driver(monkeypatch)
    said: list[str] = []
    assert devices.find_device("auto", say=said.append) == torch.device("cpu")
    assert said == [
        f"Running on the CPU, because the accelerator is not usable: {TOO_OLD}",
    ]


def test_auto_says_nothing_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    said: list[str] = []
    assert devices.find_device("auto", say=said.append) == torch.device("cpu")
    assert said == []


def test_cuda_with_a_broken_driver_is_rejected_with_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_broken_driver(monkeypatch)
    with pytest.raises(InputError) as found:
        devices.find_device("cuda")
    assert found.value.message == f"expected an available device (cpu), got 'cuda'; {TOO_OLD}"


def test_the_cpu_is_found_without_asking_for_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose driver would warn in every worker."""
    with_broken_driver(monkeypatch)  # warnings are errors here
    assert devices.select_device("cpu") == torch.device("cpu")


def test_a_device_is_found_without_becoming_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which would create a context on it."""
    cuda = torch.device("cuda")
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert devices.find_device("cuda:1") == torch.device("cuda:1")
    assert chosen == []


def test_tf32_is_disabled() -> None:
    devices.configure(threads=None)
    described = environment.describe(
        torch.device("cpu"), allocator="system", weights="none", first_forward_s=0.1
    )
    assert described.tf32 is False
    assert described.cores == os.cpu_count()


@pytest.mark.parametrize(("cache_mb", "expected_mb"), [(50, 256), (300, 600)])
def test_what_evicts_the_l2_cache_writes_twice_its_size_and_at_least_256_mb(
    cache_mb: int, expected_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(L2_cache_size=cache_mb * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    allocated: list[torch.Tensor] = []

    def allocate(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cuda", 1)
        allocated.append(torch.ones(size, dtype=dtype, device="cpu"))
        return allocated[-1]

    flush = devices.l2_flush(torch.device("cuda", 1), allocate=allocate)
    (buffer,) = allocated
    assert buffer.nbytes == expected_mb * 2**20
    assert buffer.min() == 1
    flush()
    assert buffer.max() == 0


def test_the_environment_has_the_state_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = GpuState("GPU-x", driver="580.65.06")
    monkeypatch.setattr(gpu_state, "read", {torch.device("cuda", 1): state}.get)
    monkeypatch.setattr(devices, "device_name", lambda device: "NVIDIA H100")
    described = [
        environment.describe(device, allocator="system", weights="none", first_forward_s=0.1).gpu
        for device in (torch.device("cuda", 1), torch.device("cpu"))
    ]
    assert described == [state, None]
