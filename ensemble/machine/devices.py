"""Which device to run on, and how its arithmetic is set."""

import os
import platform
from pathlib import Path

import torch

from ensemble.errors import InputError
from ensemble.machine import cores


def select_device(name: str) -> torch.device:
    """The device called `name`; for `auto` the accelerator if there is one, else the CPU.

    Raises:
        InputError: no such device here; the message says what there is.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    available = ["cpu", *(f"{accelerator.type}:{index}" for index in range(count) if accelerator)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in [*available, "cpu:0"]:
        raise InputError(
            f"expected a device that is available here ({', '.join(available)}), found {name!r}",
            argument="device",
        )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    return device


def configure(*, threads: int | None) -> None:
    """Set full float32 precision (no TF32) and the number of CPU threads, by default at most the
    cores that this process may use."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    has = torch.get_num_threads()
    wanted = threads or cores.default_threads(has, cores.find(), os.environ)
    if wanted != has:
        torch.set_num_threads(wanted)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`; the CPU queues none. An unknown device raises."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str | None:
    """What the device is called by its maker."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
