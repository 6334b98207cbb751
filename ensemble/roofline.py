"""What the device could do at best: its measured limits, and the work that N models ask for.

The roofline model: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ensemble import stacking
from ensemble.timing import synchronize

CALLS = 15  # timed calls of each measurement, after two that are not; the fastest is the limit
MATRIX_SIDE = {"cpu": 2048}  # elsewhere LARGE_SIDE: a GPU wants more work to be busy
LARGE_SIDE = 8192
READ_BYTES = 512 * 2**20  # larger than any cache


@dataclass(frozen=True)
class Limits:
    """The device's own measured limits in one dtype."""

    operations_per_s: float
    bytes_per_s: float


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


def measure(device: torch.device, dtype: torch.dtype) -> Limits:
    """The rate of a square matrix product in `dtype`, and of reading memory, on `device`."""
    side = MATRIX_SIDE.get(device.type, LARGE_SIDE)
    matrix = torch.randn(side, side, device=device).to(dtype)
    product_s = _least_seconds(lambda: matrix @ matrix, device)
    read = torch.ones(READ_BYTES // 4, device=device)
    read_s = _least_seconds(read.sum, device)
    return Limits(2 * side**3 / product_s, READ_BYTES / read_s)


def work(model: nn.Module, num_models: int, example: Tensor, dtype: torch.dtype) -> Work:
    """N forwards of `model` on inputs like `example`, counted by torch on the meta device.

    A convolution counts as a direct one: 2 operations a multiply-add. Bytes are the least traffic:
    all weights once, in `dtype`, and the input once.
    """
    one = example[0] if example.dim() == 5 else example
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stacking.skeleton(model)(one.to("meta"))
    elements = sum(tensor.numel() for tensor in stacking.named_tensors(model).values())
    moved = (num_models * elements + example.numel()) * dtype.itemsize
    return Work(float(num_models * counter.get_total_flops()), float(moved))


def _least_seconds(function: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(2 + CALLS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
