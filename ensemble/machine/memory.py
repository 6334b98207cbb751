"""Memory of the process, the machine and the device; page faults; glibc's allocator settings.

A value that the platform does not report is None, never 0.
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

from ensemble.errors import InputError, UnavailableError, chained, first_line
from ensemble.machine import cgroups

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1  # trim threshold; other values are ints, at most 2 GiB
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Per cgroup version: the files of the limit and the usage, and the reclaimable page cache.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# Out-of-memory messages: of the allocators of torch, the kernel and C++; of CUDA and its driver, as
# the instantiation of a graph reports it; of XLA; and the status codes of cuBLAS, of cuDNN
# (CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED) and of other CUDA libraries.
_NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|cannot allocate memory|bad_alloc|out of memory"
    "|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|_ALLOC_FAILED|_ALLOCATION_FAILED",
    re.IGNORECASE,
)
# torch tries cuDNN's engines in turn, skips those whose workspace cannot be allocated, and raises
# this if none is left; also where none supports the convolution. Source: Conv_v8.cpp.
_NO_ENGINE = "unable to find an engine to execute this computation"
_REQUESTED = re.compile(r"tried to allocate (\d+) bytes|unable to mmap (\d+) bytes")


def page_faults() -> int | None:
    """Minor page faults of this process so far: pages the kernel allocated and zeroed."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else None


def page_fault_seconds(pages: int = 8192, repeats: int = 5) -> float | None:
    """The cost of a minor page fault in seconds: filling fresh pages minus filling them again.

    The minimum of `repeats` measurements, a lower bound of the time that page faults explain.
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
    """Make glibc keep freed memory instead of returning it to the kernel.

    Blocks of all sizes are allocated on the heap (M_MMAP_MAX=0), and the heap is never trimmed: a
    forward that allocates the same buffers again causes no page faults. Source: mallopt(3).

    Returns:
        None on success, else why the setting is unavailable.
    """
    if platform.libc_ver()[0] != "glibc":
        return "mallopt requires glibc, which this Python does not run on"
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1:
        return None
    return "mallopt failed"


def touch(tensors: Sequence[torch.Tensor]) -> None:
    """Prefault CPU tensors: read one byte per page, so that no timed call faults them in."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()


def total_bytes() -> int | None:
    """The physical memory of the machine, in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def release() -> None:
    """Collect garbage, empty the device's caching allocator, and trim the C heap."""
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
    """Reset the peak that `peak_bytes` reports; False where that is not supported."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM, see proc(5); Linux only
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """The peak of `used_bytes` since `reset_peak`."""
    if device.type == "cpu":
        return _status_bytes("VmHWM")
    return torch.accelerator.max_memory_allocated(device)


def reserved_bytes(device: torch.device) -> int | None:
    """Bytes that CUDA's caching allocator holds of the device: allocated ones, private pools of
    CUDA graphs, and free blocks. None on other devices."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def peak_reserved_bytes(device: torch.device) -> int | None:
    """The peak of `reserved_bytes` since `reset_peak`."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def increase(before: int | None, peak: int | None, shared: int) -> int | None:
    """Peak memory of something, in bytes, with what it shares and was there before."""
    return None if before is None or peak is None else peak - before + shared


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device` without swapping."""
    if device.type != "cpu":
        try:
            return torch.accelerator.get_memory_info(device)[0]
        except RuntimeError:  # of MPS, whose allocator does not report it
            return None
    known = (_machine_bytes(), _process_bytes(), _container_bytes())
    return min((value for value in known if value is not None), default=None)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return _kibibytes(lines, "MemAvailable")
    except OSError:
        return total_bytes()


def _process_bytes() -> int | None:
    """Bytes available under the resource limits of this process (`ulimit -v`, `ulimit -d`)."""
    if resource is None:
        return None
    available = []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft_limit, used = resource.getrlimit(limit)[0], _status_bytes(name)
        if soft_limit != resource.RLIM_INFINITY and used is not None:
            available.append(max(0, soft_limit - used))
    return min(available, default=None)


def _container_bytes() -> int | None:
    """Bytes available under the cgroup limits of this process, reclaimable page cache included."""
    available = []
    for directory, version in cgroups.directories("memory"):
        available += _group_bytes(directory, *(_V2 if version == 2 else _V1))
    return min(available, default=None)


def _group_bytes(directory: Path, limit_file: str, usage_file: str, cache_key: str) -> list[int]:
    try:
        limit, usage = ((directory / name).read_text().strip() for name in (limit_file, usage_file))
        statistics = dict(
            line.split() for line in (directory / "memory.stat").read_text().splitlines()
        )
        if limit == "max":
            return []
        return [max(0, int(limit) - int(usage) + int(statistics.get(cache_key, 0)))]
    except (OSError, ValueError):
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host ran out of memory.

    Foreign code may replace the error: an allocation that fails in a CUDA graph's capture
    invalidates it, and `torch.cuda.graph` raises that on its way out. So the errors behind this one
    count too.
    """
    return any(map(_is_out_of_memory, chained(error)))


def may_be_out_of_memory(error: BaseException) -> bool:
    """Whether an error also occurs without memory: cuDNN found no algorithm for a convolution."""
    return any(_NO_ENGINE in str(one) for one in chained(error))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return _NO_MEMORY.search(str(error)) is not None  # a plain RuntimeError


@contextmanager
def unavailable_on_failure(
    what: str, *, but: tuple[type[Exception], ...] = (UnavailableError,)
) -> Iterator[None]:
    """Convert exceptions within to UnavailableError, except `but` and out-of-memory errors.

    Raises:
        UnavailableError: `what` with the type and the first line of the error.
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
def out_of_memory_as_input_error(what: str, *, argument: str) -> Iterator[None]:
    """Convert out-of-memory errors within, during `what`, to InputError.

    Raises:
        InputError: with the size of the failed allocation, if the allocator reports it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = _REQUESTED.search(str(error))
        tried = f", tried to allocate {int(found[1] or found[2]) / 1e6:,.0f} MB" if found else ""
        free = available_bytes(torch.device("cpu"))
        available = "" if free is None else f", {free / 1e6:,.0f} MB available"
        message = f"out of memory: {what}{tried}{available}; use fewer models or raise the limit"
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
