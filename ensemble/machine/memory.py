"""What the operating system and the device say about memory, and the one knob that glibc has.

Every reading that a platform does not offer is None, never 0.
"""

import ctypes
import errno
import gc
import mmap
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ensemble.errors import InputError, UnavailableError, first_line
from ensemble.machine import cgroups

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1  # as a threshold of trimming; any other is an int, so at most 2 GiB
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Files of a control group: limit, use, and what of it is a cache of files.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# What the allocators of torch, of the kernel and of C++ say.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
_ASKED = re.compile(r"tried to allocate (\d+) bytes|unable to mmap (\d+) bytes")


def page_faults() -> int | None:
    """Minor page faults of this process so far: pages the kernel had to find and clear."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else None


def page_fault_seconds(pages: int = 8192, repeats: int = 5) -> float | None:
    """What one page fault costs here, in seconds: filling fresh pages against filling them again.

    The least of `repeats` tries, so that what it explains is rather said too small than too large.
    """
    if resource is None:
        return None
    costs = []
    for _ in range(repeats):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            faults, start = page_faults() or 0, time.perf_counter()
            ctypes.memset(address, 1, len(memory))
            fresh = time.perf_counter() - start
            faults = (page_faults() or 0) - faults
            start = time.perf_counter()
            ctypes.memset(address, 2, len(memory))
            again = time.perf_counter() - start
        if faults:
            costs.append(max(fresh - again, 0.0) / faults)
    return min(costs, default=None)


def retain_freed_memory() -> str | None:
    """Tell glibc to keep what is freed instead of giving it back to the kernel at every call.

    Blocks of every size come from the heap (no mmap of their own) and the heap is not trimmed, so
    that a forward that allocates the same buffers again faults no pages in. Source: mallopt(3).

    Returns:
        None where it worked, else the reason why it cannot be had.
    """
    if platform.libc_ver()[0] != "glibc":
        return "mallopt is glibc's, and this Python does not run on glibc"
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1:
        return None
    return "glibc's mallopt refused the settings"


def touch(tensors: Sequence[torch.Tensor]) -> None:
    """Read a byte of each page of CPU tensors, so that no later call is the first to do so."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()


def total_bytes() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def release() -> None:
    """Give back all memory that is free: Python's garbage, the device's cache, the C heap."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def used_bytes(device: torch.device) -> int | None:
    """Bytes in use: the device's allocated memory, or this process's resident size on the CPU."""
    if device.type == "cpu":
        return _status_bytes("VmRSS")
    return torch.accelerator.memory_allocated(device)


def reset_peak(device: torch.device) -> bool:
    """Start a new peak for `peak_bytes`; False where that cannot be done."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5); Linux only
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """The most that `used_bytes` has been since `reset_peak`."""
    if device.type == "cpu":
        return _status_bytes("VmHWM")
    return torch.accelerator.max_memory_allocated(device)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device` without pushing anything out."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    known = (_machine_bytes(), _process_bytes(), _container_bytes())
    return min((value for value in known if value is not None), default=None)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return _kibibytes(lines, "MemAvailable")
    except OSError:
        return total_bytes()


def _process_bytes() -> int | None:
    """What the limits of this process leave (`ulimit -v`, `ulimit -d`)."""
    if resource is None:
        return None
    left = []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, used = resource.getrlimit(limit)[0], _status_bytes(name)
        if most != resource.RLIM_INFINITY and used is not None:
            left.append(max(0, most - used))
    return min(left, default=None)


def _container_bytes() -> int | None:
    """What the control groups of this process leave: a container's limit, or a job's. The cache of
    files that they hold counts as free."""
    left = []
    for folder, version in cgroups.folders("memory"):
        left += _group_bytes(folder, *(_V2 if version == 2 else _V1))
    return min(left, default=None)


def _group_bytes(folder: Path, most: str, used: str, cache: str) -> list[int]:
    try:
        limit, now = ((folder / name).read_text().strip() for name in (most, used))
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
        if limit == "max":
            return []
        return [max(0, int(limit) - int(now) + int(statistics.get(cache, 0)))]
    except (OSError, ValueError):
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Did memory run out, on the device or here?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(text in str(error) for text in _NO_MEMORY)  # a plain RuntimeError on the CPU


@contextmanager
def unavailable_on_failure(
    what: str, *, but: tuple[type[Exception], ...] = (UnavailableError,)
) -> Iterator[None]:
    """Turn what fails within, other than `but` and a lack of memory, into an UnavailableError.

    Raises:
        UnavailableError: `what`, with the type and the first line of the error.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnavailableError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def refused_in_words(what: str, *, argument: str) -> Iterator[None]:
    """A lack of memory within, for `what`, is bad input.

    Raises:
        InputError: with how much was asked for at once, where the allocator says so.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = _ASKED.search(str(error))
        more = f", {int(asked[1] or asked[2]) / 1e6:,.0f} MB more were asked for" if asked else ""
        free = available_bytes(torch.device("cpu"))
        left = "" if free is None else f", {free / 1e6:,.0f} MB are left"
        message = f"out of memory: {what}{more}{left}; use fewer models, or raise the limit"
        raise InputError(message, argument=argument) from error


def _status_bytes(name: str) -> int | None:
    try:
        return _kibibytes(_STATUS.read_text().splitlines(), name)
    except OSError:
        return None


def _kibibytes(lines: list[str], name: str) -> int | None:
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
