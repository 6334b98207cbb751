"""Large pages for what every call reads: where an address lies is then looked up less often.

The weights of N models are read once a call, a page after the other. In pages of 4 kB the processor
looks each of them up, and fetches nothing ahead beyond it. Linux gives pages of 2 MB to who asks
for them (`madvise`; by itself it gives them where it is set to `always`).
"""

import ctypes
import mmap

from torch import Tensor

PAGE_BYTES = 2 * 1024 * 1024


def in_large_pages(memory: Tensor) -> Tensor:
    """`memory`, not written to yet, with large pages asked for where whole ones lie in it."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    start = -(-memory.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    end = (memory.data_ptr() + memory.nbytes) // PAGE_BYTES * PAGE_BYTES
    if advice is not None and end > start:
        # A refusal, of a system without them, changes nothing.
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))
    return memory
