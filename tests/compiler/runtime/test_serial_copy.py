"""Single-threaded copies: the same values, and no thread of OpenMP."""

import subprocess
import sys

import pytest
import torch

from ensemble.compiler.runtime import serial_copy

SHAPES = [(), (0, 3), (5,), (2**17 + 1,), (1, 3, 224, 224), (3, 2, 3, 60, 61), (2, 1, 1, 2**16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_the_values_in_the_requested_layout_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape)
    for given in (x, x.movedim(0, -1) if shape else x, x.bfloat16()):
        found = serial_copy.contiguous(given, dtype)
        assert found.is_contiguous()
        assert torch.equal(found, given.to(dtype))
    assert serial_copy.contiguous(x) is x


def test_a_copy_starts_no_thread() -> None:
    """In a process whose only work is a copy. torch's own copy starts one."""
    program = """
import os, sys, torch
from ensemble.compiler.runtime import serial_copy
torch.set_num_threads(2)
x = torch.empty(1, 3, 512, 512)
before = len(os.listdir("/proc/self/task"))
if sys.argv[1] == "ours":
    serial_copy.contiguous(x.movedim(1, -1))
else:
    x.movedim(1, -1).contiguous()
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    started = {}
    for name in ("ours", "torch"):
        done = subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, check=True
        )
        started[name] = int(done.stdout)
    assert started == {"ours": 0, "torch": 1}
