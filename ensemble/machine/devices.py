"""Device selection, numeric settings and synchronization."""

import logging
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ensemble.errors import InputError
from ensemble.machine import cores, gpu_state, precision
from ensemble.machine.precision import Float32Precision

log = logging.getLogger(__name__)

MIN_FLUSH_BYTES = 256 * 2**20
# More streams do not help: each kernel of a ResNet already occupies a large part of a GPU.
MAX_STREAMS = 16


def find_device(name: str, *, say: Callable[[str], None] = log.warning) -> torch.device:
    """The device `name`, which this process does not begin to use: on CUDA it gets no context.

    `auto` is the accelerator if there is one, else the CPU; where the driver of one is broken,
    `say` is given the reason.

    If the first CUDA device is busy and another is not, `auto` selects the least busy one, and says
    so by `say`.

    Raises:
        InputError: the device is not available; the message lists those that are, and says why an
            accelerator is not among them.
    """
    if name in ("cpu", "cpu:0"):
        return torch.device(name)
    accelerator, why_not = _accelerator()
    if name == "auto":
        if why_not:
            say(f"Running on the CPU, because the accelerator is not usable: {why_not}")
        is_cuda = accelerator is not None and accelerator.type == "cuda"
        return _idle_cuda_device(say) if is_cuda else accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    available = ["cpu", *(f"{accelerator.type}:{index}" for index in range(count) if accelerator)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in available:
        reason = f"; {why_not}" if why_not else ""
        raise InputError(
            f"expected an available device ({', '.join(available)}), got {name!r}{reason}",
            argument="device",
        )
    return device


def select_device(name: str) -> torch.device:
    """`find_device`; one with an index becomes the current device of this process.

    Raises:
        InputError: see `find_device`.
    """
    device = find_device(name)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device


def _accelerator() -> tuple[torch.device | None, str]:
    """The accelerator of this machine, None if there is none; and what torch warned of while it
    looked for one: without a driver of the accelerator nothing, with one that is too old, say, the
    reason. torch warns once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.accelerator.current_accelerator(check_available=True)
    texts = [" ".join(str(warning.message).split()) for warning in caught]
    return found, "; ".join(text.partition(" (Triggered internally")[0] for text in texts)


def _idle_cuda_device(say: Callable[[str], None]) -> torch.device:
    """The first CUDA device, or the least busy one."""
    states = gpu_state.read_all()
    index, first = gpu_state.least_busy(states), states[0] if states else None
    if not index or first is None:
        return torch.device("cuda")
    say(f"cuda:0 is busy ({gpu_state.describe_load(first)}): selected cuda:{index}")
    return torch.device("cuda", index)


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


def l2_flush(
    device: torch.device, *, allocate: Callable[..., torch.Tensor] = torch.empty
) -> Callable[[], None]:
    """A function that queues a write to a buffer larger than the L2 cache of a CUDA device, so that
    the next call finds nothing of the previous one there.

    Source: `triton.testing.do_bench`, whose buffer has 256 MB.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = max(MIN_FLUSH_BYTES, 2 * cache)
    buffer = allocate(size // 4, dtype=torch.int32, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


def device_name(device: torch.device) -> str | None:
    """The vendor's name of the device; None if unknown. Initializes torch's state of a CUDA one."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def device_uuid(device: torch.device) -> str | None:
    """The UUID of a CUDA device, which differs between processes that see different ones; None of
    any other. Initializes torch's CUDA state."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)
