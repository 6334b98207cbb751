"""Device selection, numeric settings and synchronization."""

import os
import platform
from pathlib import Path

import torch

from ensemble.errors import InputError
from ensemble.machine import cores, precision
from ensemble.machine.precision import Float32Precision


def select_device(name: str) -> torch.device:
    """The device `name`; `auto` selects the accelerator if there is one, else the CPU.

    Raises:
        InputError: the device is not available; the message lists those that are.
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
            f"expected an available device ({', '.join(available)}), got {name!r}",
            argument="device",
        )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    return device


def configure(*, threads: int | None) -> None:
    """Disable TF32 and set the number of CPU threads, by default at most the usable cores."""
    precision.set_float32_precision(Float32Precision.IEEE)
    current = torch.get_num_threads()
    target = threads or cores.default_threads(current, cores.detect(), os.environ)
    if target != current:
        torch.set_num_threads(target)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`; a no-op on the CPU. An unknown device raises."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str | None:
    """The vendor's name of the device; None if unknown."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)
