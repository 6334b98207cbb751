"""Copies on the calling thread alone.

torch copies what is not small by OpenMP, whose threads then spin for some 5 ms each on a core of
their own (`OMP_WAIT_POLICY`), and there they are in the way of threads that are not OpenMP's.
"""

import torch
from torch import Tensor

# torch's own bound (at::internal::GRAIN_SIZE): of fewer elements it copies on one thread.
GRAIN = 2**15


def copied(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """x in another dtype or order: a new tensor that is contiguous, in C's order.

    On an accelerator there are no such threads, and this is `x.to(dtype).contiguous()`.
    """
    if x.device.type != "cpu":
        return x.to(dtype).contiguous()
    target = torch.empty(x.shape, dtype=dtype)
    _copy(x, target)
    return target


def contiguous(x: Tensor) -> Tensor:
    """x itself where it is contiguous, else a copy that is."""
    return x if x.is_contiguous() else copied(x, dtype=x.dtype)


def _copy(source: Tensor, target: Tensor) -> None:
    if source.numel() < GRAIN:
        target.copy_(source)
        return
    each = source.numel() // len(source)
    at_once = (GRAIN - 1) // each
    if not at_once:  # one is too many as well
        for one, other in zip(source, target, strict=True):
            _copy(one, other)
        return
    for some, others in zip(source.split(at_once), target.split(at_once), strict=True):
        others.copy_(some)
