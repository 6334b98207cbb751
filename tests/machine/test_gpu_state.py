"""The state of GPUs, of a made-up NVML and a made-up driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import torch

from ensemble.machine import devices, gpu_state
from ensemble.machine.gpu_state import GpuProcess, GpuReader, GpuState, cuda_uuids, least_busy

UUIDS = [str(UUID(int=number + 1)) for number in range(3)]
OURS, THEIRS = os.getpid(), 2**22 + 1  # above the largest pid of Linux


class FakeError(Exception):
    """NVML's."""


@dataclass
class FakeGpu:
    """What NVML knows of a GPU; None raises."""

    uuid: str
    utilization: int | None = 0
    reasons: int | None = 0x1
    processes: list[Any] = field(default_factory=list)
    mig_of: FakeGpu | None = None
    clocks: tuple[int, int] = (1410, 2619)
    is_mig_enabled: int | None = 0


class FakeNvml:
    """The module `pynvml`, for these GPUs in the order of their PCI addresses."""

    NVMLError = FakeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        if uuid not in self.gpus:
            raise FakeError("not found")
        return self.gpus[uuid]

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceIsMigDeviceHandle": lambda gpu: int(gpu.mig_of is not None),
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda gpu: gpu.mig_of,
            "nvmlDeviceGetMigMode": lambda gpu: (
                None if gpu.is_mig_enabled is None else [gpu.is_mig_enabled, 0]
            ),
            "nvmlDeviceGetPowerUsage": lambda gpu: 312_500,
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
            "nvmlDeviceGetUtilizationRates": lambda gpu: (
                None if gpu.utilization is None else SimpleNamespace(gpu=gpu.utilization)
            ),
            "nvmlDeviceGetName": lambda gpu: "NVIDIA H100",
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetClockInfo": lambda gpu, kind: gpu.clocks[kind - 1],
            "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: (1980, 2619)[kind - 1],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.reasons,
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: gpu.processes,
        }

        def function(*arguments: Any) -> Any:
            found = answers[name](*arguments)
            if found is None:
                raise FakeError("not supported")
            return found

        return function


class FakeDriver:
    """CUDA's driver, for devices with these UUIDs in its own order."""

    def __init__(self, *uuids: str, error: int = 0) -> None:
        self.uuids, self.error = uuids, error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.uuids)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: ctypes.c_int) -> int:  # noqa: N802
        raw._obj[:] = UUID(self.uuids[device.value]).bytes
        return 0


def process(pid: int, bytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=bytes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs these GPUs, which CUDA sees in the order of `visible`."""

    def install(*gpus: FakeGpu, visible: list[str]) -> None:
        monkeypatch.setattr(gpu_state, "_loaded", lambda: FakeNvml(*gpus))
        monkeypatch.setattr(gpu_state, "cuda_uuids", lambda: tuple(visible))

    return install


def test_the_state_of_a_gpu_has_units_and_names() -> None:
    gpu = FakeGpu(f"GPU-{UUIDS[0]}", utilization=57, reasons=0x4 | 0x20)
    gpu.processes = [process(OURS, 5 * 10**8), process(THEIRS, 12 * 10**9)]
    state = GpuReader(FakeNvml(gpu), gpu.uuid, gpu).read()
    assert state == GpuState(
        uuid=gpu.uuid,
        name="NVIDIA H100",
        mig=False,
        driver="580.65.06",
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        sm_clock_hz=1_410_000_000,
        max_sm_clock_hz=1_980_000_000,
        memory_clock_hz=2_619_000_000,
        max_memory_clock_hz=2_619_000_000,
        power_w=312.5,
        power_limit_w=700.0,
        temperature_celsius=61,
        utilization=0.57,
        throttle_reasons=("SwPowerCap", "SwThermalSlowdown"),
        other_processes=(GpuProcess(THEIRS, 12 * 10**9),),
    )
    assert state.slowed_by == ("SwPowerCap", "SwThermalSlowdown")
    assert gpu_state.describe_load(state) == "57% utilized, 1 other process holds 12.0 GB"


def test_a_figure_that_nvml_does_not_have_is_unknown() -> None:
    gpu = FakeGpu("GPU-x", utilization=None, reasons=None, is_mig_enabled=None)
    state = GpuReader(FakeNvml(gpu), gpu.uuid, gpu).read()
    assert (state.utilization, state.throttle_reasons, state.mig) == (None, None, None)
    assert state.temperature_celsius == 61
    assert not state.is_busy
    assert state.slowed_by == ()


def test_idle_clocks_and_those_set_by_an_administrator_are_not_throttling() -> None:
    state = GpuState("GPU-x", throttle_reasons=("GpuIdle", "ApplicationsClocksSetting"))
    assert state.slowed_by == ()


@pytest.mark.parametrize(
    ("utilization", "bytes", "is_busy"),
    [(0.0, 5 * 10**8, False), (0.1, 0, False), (0.11, 0, True), (0.0, 10**9 + 1, True)],
)
def test_a_gpu_is_busy_by_its_utilization_or_by_the_memory_of_others(
    utilization: float, bytes: int, is_busy: bool
) -> None:
    others = (GpuProcess(1, bytes), GpuProcess(2, None))
    state = GpuState("GPU-x", utilization=utilization, other_processes=others)
    assert state.is_busy is is_busy


def test_processes_of_this_run_are_not_others() -> None:
    gpu = FakeGpu("GPU-x")
    reader = GpuReader(FakeNvml(gpu), gpu.uuid, gpu)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        pids = (OURS, os.getppid(), child.pid, THEIRS, THEIRS + 1, 1)
        gpu.processes = [process(pid, 1) for pid in pids]
        others = reader.read(own=[THEIRS]).other_processes
        child.kill()
    expected = (GpuProcess(THEIRS + 1, 1), GpuProcess(1, 1))
    assert others == (expected if os.getppid() != 1 else expected[:1])


def test_in_a_container_whose_pids_are_those_of_the_host_other_processes_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu("GPU-x", utilization=90, processes=[process(THEIRS, 10**10)])
    reader = GpuReader(FakeNvml(gpu), gpu.uuid, gpu)
    assert reader.read().is_shared
    assert reader.read().utilization == 0.9
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**20)
    assert reader.read().other_processes is None
    assert reader.read().utilization is None  # it may be our own
    gpu.processes.append(process(OURS, 2**20))
    assert reader.read().other_processes == (GpuProcess(THEIRS, 10**10),)


def test_an_instance_of_mig_has_the_clocks_of_its_gpu_and_its_own_processes(machine: Any) -> None:
    whole = FakeGpu("GPU-whole", clocks=(1000, 2000), is_mig_enabled=1)
    instance = FakeGpu(f"MIG-{UUIDS[0]}", mig_of=whole, processes=[process(THEIRS, 7)])
    machine(whole, instance, visible=[UUIDS[0]])
    state = gpu_state.read(torch.device("cuda"))
    assert state is not None
    assert (state.uuid, state.mig, state.sm_clock_hz) == (instance.uuid, True, 10**9)
    assert state.other_processes == (GpuProcess(THEIRS, 7),)


def test_a_device_is_matched_by_uuid_and_not_by_its_index(machine: Any) -> None:
    """NVML has the order of PCI addresses, CUDA that of CUDA_VISIBLE_DEVICES: here 2, 0."""
    gpus = [FakeGpu(f"GPU-{uuid}", utilization=10 * k) for k, uuid in enumerate(UUIDS)]
    machine(*gpus, visible=[UUIDS[2], UUIDS[0]])
    found = [gpu_state.read(torch.device("cuda", index)) for index in (0, 1, 2)]
    assert [state and state.utilization for state in found] == [0.2, 0.0, None]
    states = gpu_state.read_all()
    assert [state and state.uuid for state in states] == [gpus[2].uuid, gpus[0].uuid]


def test_without_nvml_or_cuda_the_state_is_unknown(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(FakeGpu(f"GPU-{UUIDS[0]}"), visible=[UUIDS[0]])
    assert gpu_state.read(torch.device("cpu")) is None
    assert gpu_state.read(torch.device("cuda")) is not None
    monkeypatch.setattr(gpu_state, "_loaded", lambda: None)
    assert gpu_state.read(torch.device("cuda")) is None
    assert gpu_state.read_all() == [None]
    monkeypatch.setattr(gpu_state, "cuda_uuids", tuple)
    assert gpu_state.read(torch.device("cuda")) is None


@pytest.mark.parametrize("error", [ImportError("no pynvml"), RuntimeError("driver not loaded")])
def test_a_module_that_cannot_be_loaded_is_none(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(gpu_state, "import_module", fails)
    assert gpu_state._loaded.__wrapped__() is None


def test_uuids_come_from_the_driver_in_its_own_order() -> None:
    assert cuda_uuids(FakeDriver(UUIDS[2], UUIDS[0])) == (UUIDS[2], UUIDS[0])
    assert cuda_uuids(FakeDriver()) == ()
    assert cuda_uuids(FakeDriver(UUIDS[0], error=100)) == ()


def state(utilization: float, bytes: int = 0) -> GpuState:
    return GpuState("GPU-x", utilization=utilization, other_processes=(GpuProcess(1, bytes),))


def test_the_first_gpu_is_taken_unless_it_is_busy_and_another_is_idle() -> None:
    idle, busy = state(0.0), state(0.9)
    assert least_busy([]) == least_busy([None, idle]) == 0
    assert least_busy([idle, idle]) == 0
    assert least_busy([busy, busy, None]) == 0
    assert least_busy([busy, None, state(0.05), state(0.02, 10**8), state(0.02)]) == 4


def test_auto_leaves_a_busy_gpu_for_an_idle_one_and_says_so(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    busy = FakeGpu(f"GPU-{UUIDS[0]}", utilization=90, processes=[process(THEIRS, 30 * 10**9)])
    idle = FakeGpu(f"GPU-{UUIDS[1]}")
    machine(idle, busy, visible=UUIDS[:2])
    assert devices.find_device("auto", say=said.append) == torch.device("cuda", 1)
    assert said == ["cuda:0 is busy (90% utilized, 1 other process holds 30.0 GB): selected cuda:1"]
    machine(idle, busy, visible=UUIDS[1::-1])
    assert devices.find_device("auto", say=said.append) == torch.device("cuda")
    assert len(said) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_driver_and_torch_agree_on_the_uuid_of_each_device() -> None:
    expected = [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]
    assert list(cuda_uuids()) == expected
    found = gpu_state.read(torch.device("cuda"))
    if found is not None:  # nvidia-ml-py is installed
        assert replace(found, uuid="").name == torch.cuda.get_device_name(0)
        assert (found.max_sm_clock_hz or 0) > 10**8
