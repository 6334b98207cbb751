"""The environment that measurements are taken in. Imports no torch at its top."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.machine import cores
from ensemble.machine.gpu_state import GpuState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Environment:
    """The machine, the versions and the settings of a run. Unknown is None."""

    date: str
    argv: tuple[str, ...]
    git_commit: str | None
    platform: str
    python: str
    torch: str
    torchvision: str
    device: str
    device_name: str | None
    cpu_capability: str
    cores: int | None
    threads: int
    tf32: bool
    cudnn_benchmark: bool
    allocator: str
    page_fault_s: float | None
    weights: str
    first_forward_s: float  # the first forward of the process, of one model
    # Of a run over the ranks of torchrun, in their order; None without torchrun.
    ranks: int | None = None
    backend: str | None = None  # gloo or nccl
    hosts: tuple[str, ...] | None = None
    rank_devices: tuple[str, ...] | None = None
    usable_cores: float | None = None  # below `cores` by affinity or a CPU quota
    gpu: GpuState | None = None  # before the run
    preprocessing: str | None = None  # mean and standard deviation of the images' channels


def describe(
    device: torch.device, *, allocator: str, weights: str, first_forward_s: float
) -> Environment:
    """The environment of the measurements that are about to be taken."""
    import torch

    from ensemble.machine import devices, gpu_state, memory
    from ensemble.machine.precision import Float32Precision, current_float32_precision

    found = cores.detect()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        argv=tuple(sys.argv),
        git_commit=git_commit(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=version("torchvision"),
        device=str(device),
        device_name=devices.device_name(device),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cores=found.machine,
        usable_cores=found.usable,
        threads=torch.get_num_threads(),
        tf32=current_float32_precision() is Float32Precision.TF32,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        allocator=allocator,
        page_fault_s=memory.page_fault_seconds(),
        weights=weights,
        first_forward_s=first_forward_s,
        gpu=gpu_state.read(device),
    )


def git_commit() -> str | None:
    """The commit of this checkout, with a + if its files have changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
