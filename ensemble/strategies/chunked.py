"""vmap over some models at a time: `torch.vmap`'s own `chunk_size`, chosen at build by trial.

A vmapped activation is N times larger than a model's. Chunks are the remedy that torch has for the
memory that this takes, and on a CPU for the pages that the allocator gives back at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ensemble.strategies import autotune, eager
from ensemble.strategies.build_result import Built


def vmap(models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float) -> Built:
    """`eager.vmap` in chunks of the size that is fastest on the example: all, half, ... or 1."""
    found = autotune.fastest(
        {str(size): partial(eager.vmap, models, example, size) for size in sizes(len(models))},
        example,
        check=lambda logits: None,  # the same function, called with fewer models
        seconds=tune_seconds,
    )
    assert found.built is not None
    tried = f" (tried: {found.tried})" if found.tried else ""
    kept = found.built
    return Built(kept.forward, f"chunk_size: {found.name}{tried}", later=kept.later)


def sizes(num_models: int) -> list[int]:
    """N, and its halves, rounded up, down to 1."""
    return [num_models] if num_models == 1 else [num_models, *sizes((num_models + 1) // 2)]
