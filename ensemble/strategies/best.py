"""`best`: the strategy that is the fastest here, found by trying those that could be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.machine.dtypes import is_emulated
from ensemble.models import stacking
from ensemble.strategies import (
    LOOP,
    STRATEGIES,
    agreement,
    autotune,
    eager,
    make,
)
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.build_result import Built, Choice

# What could win on a kind of device. The loop comes first: it is what all the others must beat.
# Then the likely winners, so that the others are soon clearly behind; where each takes long to
# build, what builds quickly, so that time that is over costs least.
CANDIDATES = {
    "cpu": (
        "loop",
        "lowered_vmap",
        "prepacked_concurrent",
        "concurrent",
        "prepacked_loop",
        "folded_vmap",
    ),
    "cuda": (
        "loop",
        "cudagraph_concurrent",
        "cudagraph_vmap",
        "cudagraph_compiled_concurrent",
        "cudagraph_compiled_im2col_vmap",
    ),
}
ELSEWHERE = ("loop", "folded_loop", "folded_vmap", "concurrent", "vmap")
# What building one takes at most, in times of the models' weights: `lowered_vmap` of four ResNet-18
# held 917 MB, their weights 187 MB.
MOST_WEIGHTS = 5


def fastest(models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float) -> Built:
    """The fastest candidate, by duels on the example; all others are released.

    Each must give the logits of the loop in float32, as a row of the table must.
    """
    begin = time.perf_counter()
    names = candidates(example.device, weight_dtype(models, example))
    x = agreement.informative(example)
    found = autotune.fastest(
        {name: partial(make, name, models, example) for name in names},
        x,
        check=_checker(models, x),
        seconds=tune_seconds,
        bytes_each=MOST_WEIGHTS * sum(map(stacking.weight_bytes, models)),
    )
    assert found.built is not None
    took = time.perf_counter() - begin - found.build_s[found.name]
    note = f"picked {found.name} (tried: {found.tried})"
    kept = found.built
    return Built(kept.forward, kept.note, Choice(found.name, note, took), kept.later)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of what is tried on a device, in this order.

    Where the CPU emulates a dtype, all but our own kernels, which compute in float32, convert each
    number at each step, as the loop does: none is worth its trial.
    """
    names = CANDIDATES.get(device.type, ELSEWHERE)
    if not is_emulated(dtype, device):
        return names
    return tuple(name for name in names if name == LOOP or STRATEGIES[name].has_kernels)


def _checker(models: Sequence[nn.Module], x: Tensor) -> Callable[[Tensor], None]:
    """Raises for logits that the loop in float32 does not give."""
    dtype = weight_dtype(models, x)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    limit = agreement.TOLERANCES[dtype]
    agrees = partial(agreement.check, tolerance=limit, nan_agrees=True)
    reference = eager.logits_in(models, x, at_least_float32)
    own = reference if dtype == at_least_float32 else eager.logits_in(models[:1], x, dtype)

    def check(logits: Tensor) -> None:
        if logits.dtype != own.dtype:
            raise ValueError(f"expected logits in {own.dtype}, found {logits.dtype}")
        problem = agrees(logits, reference).problem
        if not problem:
            return
        if agrees(eager.logits_in(models, x, at_least_float32), reference).problem:
            raise ValueError(
                "models: expected the same answer at each call, found models that are random in"
                " eval mode (dropout that stays on?)"
            )
        raise ValueError(problem)

    return check
