"""vmap over chunks of models: like `torch.vmap(chunk_size=...)`, with an autotuned chunk size.

A vmapped activation is N times larger than a single model's. Chunking limits the memory, and on a
CPU also the page faults of buffers that the allocator returns to the kernel after every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from ensemble.strategies import autotune, eager
from ensemble.strategies.build_result import BuildResult


def vmap(models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float) -> BuildResult:
    """`eager.vmap` in chunks of the size that is fastest for the example: N, N/2, ..., 1."""
    found = autotune.select_fastest(
        {str(size): partial(eager.vmap, models, example, size) for size in sizes(len(models))},
        example,
        check=lambda logits: None,  # all candidates run the same function
        seconds=tune_seconds,
    )
    assert found.built is not None
    details = f"tried: {found.tried}" if found.tried else ""
    return replace(found.built, note=f"chunk_size: {found.name}", details=details)


def sizes(num_models: int) -> list[int]:
    """N, repeatedly halved and rounded up, down to 1."""
    return [num_models] if num_models == 1 else [num_models, *sizes((num_models + 1) // 2)]
