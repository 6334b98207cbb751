"""Large pages for what every call reads: where an address lies is then looked up less often.

The weights of N models are read once a call, a page after the other. In pages of 4 kB the processor
looks each of them up, and fetches nothing ahead beyond it. Linux gives pages of 2 MB to who asks
for them (`madvise`; by itself it gives them where it is set to `always`), and only for memory that
nobody has used yet: so it comes from the system, not from the allocator.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE_BYTES = 2 * 1024 * 1024


def in_large_pages(size: int) -> Tensor:
    """So many bytes, uint8, that begin at a large page where there is a whole one of them.

    Their content is not defined. Where the system knows no large pages they lie in small ones.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < PAGE_BYTES:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them
        memory.madvise(advice)
    values = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    start = -values.data_ptr() % PAGE_BYTES
    return values[start : start + size]
