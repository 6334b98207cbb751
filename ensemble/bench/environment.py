"""The environment that measurements are taken in."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ensemble.bench.records import Environment
from ensemble.machine import cores, devices, memory


def describe(
    device: torch.device, *, allocator: str, weights: str, first_forward_s: float
) -> Environment:
    """The environment of the measurements that are about to be taken."""
    found = cores.find()
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
        tf32=torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        allocator=allocator,
        page_fault_s=memory.page_fault_seconds(),
        weights=weights,
        first_forward_s=first_forward_s,
    )


def git_commit() -> str | None:
    """The commit of this program, with a + where its files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
