"""Memory in huge pages: its alignment and its lifetime."""

import gc

import pytest
import torch

from ensemble.compiler.runtime.huge_pages import PAGE_BYTES, allocate_huge


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES + 1])
def test_memory_has_the_requested_size_and_is_aligned_if_it_fills_a_page(size: int) -> None:
    memory = allocate_huge(size).fill_(7)
    assert memory.dtype == torch.uint8
    assert memory.shape == (size,)
    assert int(memory.sum(dtype=torch.int64)) == 7 * size
    assert size < PAGE_BYTES or memory.data_ptr() % PAGE_BYTES == 0


def test_a_view_keeps_the_memory() -> None:
    view = allocate_huge(2 * PAGE_BYTES).view(torch.float32).view(2, -1).fill_(3.0)[1]
    gc.collect()
    assert bool((view == 3.0).all())
