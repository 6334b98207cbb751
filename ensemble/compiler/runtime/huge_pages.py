"""Memory in huge pages, for whatever every call reads: fewer TLB misses.

A call reads the weights of N models once, page after page. With pages of 4 kB each page costs a TLB
miss, and the hardware prefetcher stops at its end. Linux gives huge pages of 2 MB on request
(`madvise`; unasked only where transparent huge pages are set to `always`), and only for memory that
is still untouched: so the memory comes from `mmap`, not from the allocator.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE_BYTES = 2 * 1024 * 1024


def allocate_huge(size: int) -> Tensor:
    """So many bytes, uint8, uninitialized; aligned to a huge page if they fill one.

    Where the system has no huge pages, in small ones.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < PAGE_BYTES:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a Linux kernel without huge pages
        memory.madvise(advice)
    values = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    start = -values.data_ptr() % PAGE_BYTES
    return values[start : start + size]
