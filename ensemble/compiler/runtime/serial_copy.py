"""Single-threaded copies.

torch copies large tensors by OpenMP, whose threads then spin for some 5 ms each (`OMP_WAIT_POLICY`)
and compete for the cores with our own threads.
"""

import torch
from torch import Tensor

# torch's grain size (at::internal::GRAIN_SIZE): it copies fewer elements on one thread.
GRAIN = 2**15


def contiguous(x: Tensor, dtype: torch.dtype | None = None, *, copy: bool = False) -> Tensor:
    """`x.to(dtype).contiguous()`: x itself if it is both, unless `copy`.

    On an accelerator torch copies: no OpenMP threads take part.
    """
    dtype = dtype or x.dtype
    if x.device.type != "cpu":
        return x.to(dtype, copy=copy, memory_format=torch.contiguous_format)
    if x.dtype == dtype and x.is_contiguous() and not copy:
        return x
    target = torch.empty(x.shape, dtype=dtype, device=x.device)
    _copy(x, target)
    return target


def zero_padded(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype).contiguous()`, zero-padded to `size` in its last dimension."""
    found = x.shape[-1]
    if found == size:
        return contiguous(x, dtype)
    target = torch.empty((*x.shape[:-1], size), dtype=dtype, device=x.device)
    _copy(x, target[..., :found])
    zero = torch.zeros((), dtype=dtype, device=x.device)
    _copy(zero.expand(*x.shape[:-1], size - found), target[..., found:])
    return target


def _copy(source: Tensor, target: Tensor) -> None:
    if source.numel() < GRAIN:
        target.copy_(source)
        return
    each = source.numel() // len(source)
    at_once = (GRAIN - 1) // each
    if not at_once:  # one slice exceeds the grain size
        for one, other in zip(source, target, strict=True):
            _copy(one, other)
        return
    for some, others in zip(source.split(at_once), target.split(at_once), strict=True):
        others.copy_(some)
