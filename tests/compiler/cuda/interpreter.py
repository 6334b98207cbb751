"""Whether the kernels run here: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _count(out, length):  # type: ignore[no-untyped-def]
    for index in tl.range(0, length):
        tl.store(out + index, index)


@cache
def why_not() -> str:
    """Why the kernels do not run here; empty if they do."""
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        return "neither a GPU nor Triton's interpreter"
    try:
        _count[(1,)](torch.zeros(2, device=DEVICE), 2)
    except Exception as error:  # that of Triton 3.6 does not run with numpy 2.4
        return f"Triton's interpreter does not run here: {error}"
    return ""


def require() -> None:
    """Skip a module whose kernels cannot run."""
    if reason := why_not():
        pytest.skip(reason, allow_module_level=True)
