"""The state of NVIDIA GPUs, by NVML: clocks, power, throttling, other processes.

The package is nvidia-ml-py (module `pynvml`). Where it, the driver or a single figure is missing,
the figure is None. Imports no torch at its top.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# A GPU is busy above this utilization, or if other processes hold more memory than an idle one,
# whose context takes about 0.5 GB.
BUSY_UTILIZATION, BUSY_BYTES = 0.1, 10**9
# Bits of nvmlDeviceGetCurrentClocksEventReasons, from nvml.h.
REASONS = {
    0x01: "GpuIdle",
    0x02: "ApplicationsClocksSetting",
    0x04: "SwPowerCap",
    0x08: "HwSlowdown",
    0x10: "SyncBoost",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
    0x100: "DisplayClockSetting",
}
POWER_OR_THERMAL = {REASONS[bit] for bit in (0x04, 0x08, 0x20, 0x40, 0x80)}


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU, and the memory that it holds there."""

    pid: int
    bytes: int | None


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment. Unknown is None.

    With MIG, clocks, power, temperature and throttling are those of the whole GPU. `utilization` is
    the share of the last second or less in which a kernel ran, 0 to 1; unknown where this process
    holds memory of a GPU, since it would be its own. `other_processes` are those that do not belong
    to this run.
    """

    uuid: str
    name: str | None = None
    mig: bool | None = None
    driver: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    sm_clock_hz: int | None = None
    max_sm_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    max_memory_clock_hz: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_celsius: int | None = None
    utilization: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    other_processes: tuple[GpuProcess, ...] | None = None

    @property
    def others_bytes(self) -> int:
        """The memory that other processes are known to hold."""
        return sum(one.bytes or 0 for one in self.other_processes or ())

    @property
    def is_shared(self) -> bool:
        """Do other processes hold more memory than idle ones?"""
        return self.others_bytes > BUSY_BYTES

    @property
    def is_busy(self) -> bool:
        """Is it shared or utilized, while this run does not use it?"""
        return self.is_shared or (self.utilization or 0.0) > BUSY_UTILIZATION

    @property
    def slowed_by(self) -> tuple[str, ...]:
        """The reasons of power and temperature for which its clocks are lowered."""
        return tuple(one for one in self.throttle_reasons or () if one in POWER_OR_THERMAL)


class GpuReader:
    """Reads the state of one GPU."""

    def __init__(self, nvml: Any, uuid: str, handle: Any) -> None:
        self._nvml, self._uuid, self._handle = nvml, uuid, handle
        self._mig = bool(self._known(nvml.nvmlDeviceIsMigDeviceHandle, handle))
        whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle
        self._gpu = (self._known(whole, handle) if self._mig else None) or handle

    def read(self, *, own: Collection[int] = ()) -> GpuState:
        """The state now.

        own: processes of this run, besides this one, its parent, and other workers of the parent.
        """
        import torch

        nvml, gpu, known = self._nvml, self._gpu, self._known
        mig = known(nvml.nvmlDeviceGetMigMode, gpu)
        power, limit = (
            known(function, gpu)
            for function in (nvml.nvmlDeviceGetPowerUsage, nvml.nvmlDeviceGetEnforcedPowerLimit)
        )
        rates = None if _is_in_use() else known(nvml.nvmlDeviceGetUtilizationRates, self._handle)
        return GpuState(
            uuid=self._uuid,
            name=known(nvml.nvmlDeviceGetName, self._handle),
            mig=None if mig is None else bool(mig[0]),
            driver=known(nvml.nvmlSystemGetDriverVersion),
            cuda=torch.version.cuda,
            cudnn=_cudnn_version(),
            sm_clock_hz=self._clock(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            max_sm_clock_hz=self._clock(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_hz=self._clock(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            max_memory_clock_hz=self._clock(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1e3,
            power_limit_w=None if limit is None else limit / 1e3,
            temperature_celsius=known(
                nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU
            ),
            utilization=None if rates is None else rates.gpu / 100,
            throttle_reasons=self._reasons(),
            other_processes=self._others(own),
        )

    def _known(self, function: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def _clock(self, function: Callable[..., int], kind: int) -> int | None:
        megahertz = self._known(function, self._gpu, kind)
        return None if megahertz is None else megahertz * 10**6

    def _reasons(self) -> tuple[str, ...] | None:
        bits = self._known(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._gpu)
        return None if bits is None else tuple(REASONS[bit] for bit in REASONS if bits & bit)

    def _others(self, own: Collection[int]) -> tuple[GpuProcess, ...] | None:
        """The processes that are not of this run.

        None where this process holds memory of a GPU, but is not listed: in a container NVML gives
        the pids of the host, which do not identify our own.
        """
        listed = self._known(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        if listed is None:
            return None
        others = tuple(
            GpuProcess(one.pid, one.usedGpuMemory) for one in listed if not _is_own(one.pid, own)
        )
        if _is_in_use():
            return others if os.getpid() in {one.pid for one in listed} else None
        return others


def open_reader(device: torch.device) -> GpuReader | None:
    """The reader of a device; None where it is not CUDA's, or NVML does not know it."""
    if device.type != "cuda":
        return None
    import torch

    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    uuids = cuda_uuids()
    return _reader_of(uuids[index], _loaded()) if index < len(uuids) else None


def read(device: torch.device) -> GpuState | None:
    """The state of a device now; None where it is unknown."""
    reader = open_reader(device)
    return reader.read() if reader else None


def read_all() -> list[GpuState | None]:
    """The states of all CUDA devices now, in CUDA's order."""
    readers = [_reader_of(uuid, _loaded()) for uuid in cuda_uuids()]
    return [reader.read() if reader else None for reader in readers]


def least_busy(states: Sequence[GpuState | None]) -> int:
    """The device to take: the first, or the least busy one if that is busy and another is not."""
    first = states[0] if states else None
    if first is None or not first.is_busy:
        return 0
    idle = [
        (state.utilization or 0.0, state.others_bytes, index)
        for index, state in enumerate(states)
        if state is not None and not state.is_busy
    ]
    return min(idle)[2] if idle else 0


def describe_load(state: GpuState) -> str:
    """`57% utilized, 2 other processes hold 12.3 GB`, of what is known and not zero."""
    parts = [f"{state.utilization:.0%} utilized"] if state.utilization else []
    if state.other_processes:
        count = len(state.other_processes)
        who = "1 other process holds" if count == 1 else f"{count} other processes hold"
        parts.append(f"{who} {state.others_bytes / 1e9:.1f} GB")
    return ", ".join(parts)


def cuda_uuids(driver: Any = None) -> tuple[str, ...]:
    """The UUIDs of CUDA's devices in CUDA's own order, to which CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER apply, without a context. NVML knows no such order. Empty without a driver.

    driver: the library of CUDA's driver API; by default that of the system.
    """
    import ctypes

    try:
        driver = driver or ctypes.CDLL("nvcuda" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), index):
            return ()
        if driver.cuDeviceGetUuid_v2(ctypes.byref(raw), device):  # with MIG that of the instance
            return ()
        digits = bytes(raw).hex()
        found.append("-".join(digits[i:j] for i, j in pairwise((0, 8, 12, 16, 20, 32))))
    return tuple(found)


@cache
def _loaded() -> Any:
    """The initialized module `pynvml`; None if there is none."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, another package of its name, no driver
        return None
    return nvml


def _reader_of(uuid: str, nvml: Any) -> GpuReader | None:
    for name in (f"GPU-{uuid}", f"MIG-{uuid}") if nvml else ():
        try:
            return GpuReader(nvml, name, nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            continue
    return None


def _is_in_use() -> bool:
    """Does this process hold memory of a GPU?"""
    import torch

    return torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 0


def _cudnn_version() -> int | None:
    import torch

    try:
        found: int | None = torch.backends.cudnn.version()
    except RuntimeError:  # not the version that torch was built with
        return None
    return found


def _is_own(pid: int, own: Collection[int]) -> bool:
    """Is it this process, its parent, a child, or another worker of the parent, which leads a
    session of its own?"""
    if pid in (os.getpid(), os.getppid(), *own):
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent, session = int(status[1]), int(status[3])
    except (OSError, ValueError, IndexError):
        return False
    return parent == os.getpid() or (parent == os.getppid() and session == pid)
