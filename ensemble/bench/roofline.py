"""The roofline: measured limits of the device, and the work that N models need.

The roofline model: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemble.bench.case import Case
from ensemble.bench.failures import optional
from ensemble.bench.measurement import Roofline
from ensemble.bench.setup import make_example
from ensemble.machine.devices import synchronize
from ensemble.machine.dtypes import NumericFormat, numeric_format
from ensemble.machine.precision import float32_precision
from ensemble.machine.timing import Clock, time_call
from ensemble.models import stacking

if TYPE_CHECKING:
    from ensemble.bench.workload import Workload

# Timed calls of each measurement, after one that is not; the fastest is the limit. Once BUDGET_S
# are over, no more than LEAST_CALLS.
CALLS, LEAST_CALLS = 15, 3
BUDGET_S = 1.0
SMALL_SIDE = 512
MATRIX_SIDE = {"cpu": 2048}  # elsewhere LARGE_SIDE: a GPU wants more work to be busy
LARGE_SIDE = 8192
READ_BYTES = 512 * 2**20  # larger than any cache
# Launches between two CUDA events: the device works them off without a gap, so that neither a
# launch nor a synchronization is part of the time. A copy of READ_BYTES takes 0.3 ms on an H100.
LAUNCHES = 10


@dataclass(frozen=True)
class Limits:
    """The device's own measured limits in one dtype."""

    operations_per_s: float
    bytes_per_s: float
    cache_bytes: int | None = None  # L2 of a CUDA device; None elsewhere


@dataclass(frozen=True)
class Work:
    """What one forward of all models needs at least: operations, and bytes moved once."""

    operations: float
    bytes: float

    def least_seconds(self, limits: Limits) -> tuple[float, str]:
        """The least time that `limits` allow, and which of the two binds: compute or memory."""
        compute = self.operations / limits.operations_per_s
        memory = self.bytes / limits.bytes_per_s
        return max((compute, "compute"), (memory, "memory"))


def measure_limits(
    device: torch.device,
    dtype: torch.dtype,
    *,
    read_bytes: int = READ_BYTES,
    clock: Clock = time.perf_counter,
) -> Limits:
    """The rate of a square matrix product in `dtype`, and of moving memory, on `device`.

    Memory is read, by a sum; on CUDA also copied within the device, which reads and writes each
    byte; the faster of the two is the limit. CUDA calls are timed by events over several launches.

    The matrix grows while products take less than half of `BUDGET_S`, the best rate is the limit:
    where they are slow (float16 on a CPU that computes it one number at a time), those of a small
    matrix are long enough to time.

    read_bytes: how much memory is read; more than any cache holds.
    """
    side, largest = SMALL_SIDE, MATRIX_SIDE.get(device.type, LARGE_SIDE)
    product_s = _least_seconds(_product(side, device, dtype), device, clock)
    rate = 2 * side**3 / product_s
    while side < largest and 2**3 * product_s < BUDGET_S / 2:
        side *= 2
        product_s = _least_seconds(_product(side, device, dtype), device, clock)
        rate = max(rate, 2 * side**3 / product_s)
    return Limits(rate, _bytes_per_second(device, read_bytes, clock), _cache_bytes(device))


def _bytes_per_second(device: torch.device, read_bytes: int, clock: Clock) -> float:
    read = torch.ones(read_bytes // 4, device=device, dtype=torch.float32)
    rate = read_bytes / _least_seconds(read.sum, device, clock)
    if device.type == "cuda":  # a sum reached 2.7 TB/s on an H100, a copy 3.0
        copy = torch.empty_like(read)
        copy_s = _least_seconds(lambda: copy.copy_(read), device, clock)
        rate = max(rate, 2 * read_bytes / copy_s)
    return rate


def _cache_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).L2_cache_size) or None


Measured = dict[str, tuple[Limits | None, tuple[str, ...]]]  # by dtype, with notes


def limits_of(cases: Sequence[Case], device: torch.device) -> Measured:
    """The device's limits in each dtype of the cases, with a note where they cannot be measured."""
    return {
        dtype: optional("roofline", partial(_limits_in, numeric_format(dtype), device))
        for dtype in dict.fromkeys(case.dtype for case in cases)
    }


def _limits_in(numbers: NumericFormat, device: torch.device) -> Limits:
    with float32_precision(numbers.float32_precision):
        return measure_limits(device, numbers.dtype)


def of_case(case: Case, measured: Measured, workload: Workload) -> Roofline:
    """The roofline of a case by the measured limits of the device."""
    limits, problem = measured[case.dtype]
    if limits is None:
        return Roofline(problem=problem[0])
    dtype = numeric_format(case.dtype).dtype
    example = make_example(workload.images(case.image_size), case)
    count = workload.on_one_device(case.num_models)
    needed, problem = optional("roofline", partial(work, workload.models[0], count, example, dtype))
    if needed is None:
        return Roofline(problem=problem[0])
    least_s, bound = needed.least_seconds(limits)
    return Roofline(least_s, bound, note=_cache_note(needed, bound, limits.cache_bytes))


def _cache_note(needed: Work, bound: str, cache_bytes: int | None) -> str | None:
    """A remark where the bytes of a call may stay in the cache from one call to the next, so that
    the measured bandwidth of the device's memory does not bound it."""
    if bound != "memory" or cache_bytes is None or needed.bytes > cache_bytes:
        return None
    moved, cache = (f"{number / 1e6:,.0f} MB" for number in (needed.bytes, cache_bytes))
    return (
        f"weights and input ({moved}) fit the L2 cache ({cache}): its roofline is no bound by the"
        " device's memory"
    )


def work(model: nn.Module, num_models: int, example: Tensor, dtype: torch.dtype) -> Work:
    """N forwards of `model` on inputs like `example`, counted by torch on the meta device.

    A convolution counts as a direct one: 2 operations a multiply-add. Bytes are the least traffic:
    all weights once, in `dtype`, and the input once.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, in 0.1 s

    one = example[0] if example.dim() == 5 else example
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stacking.skeleton(model)(one.to("meta"))
    elements = sum(tensor.numel() for tensor in stacking.named_tensors(model).values())
    moved = (num_models * elements + example.numel()) * dtype.itemsize
    return Work(float(num_models * counter.get_total_flops()), float(moved))


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    matrix = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
    return lambda: matrix @ matrix


def _least_seconds(function: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """The fastest of `CALLS` calls, of fewer where they take longer than `BUDGET_S` together."""
    function()
    synchronize(device)
    begin, times = clock(), list[float]()
    while len(times) < CALLS:
        if device.type == "cuda":
            times.append(_seconds_by_events(function))
        else:
            sample = time_call(function, synchronize=lambda: synchronize(device), clock=clock)
            times.append(sample.seconds)
        if len(times) >= LEAST_CALLS and clock() - begin >= BUDGET_S:
            break
    return min(times)


def _seconds_by_events(function: Callable[[], object]) -> float:
    """The time of a call on the CUDA device, of `LAUNCHES` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(LAUNCHES):
        function()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / LAUNCHES
