"""`best`: autotune over the strategies that are likely to be the fastest on this kind of device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.errors import first_line
from ensemble.machine.dtypes import is_emulated
from ensemble.models import stacking
from ensemble.models.outputs import class_count, is_class_logits
from ensemble.strategies import (
    LOOP,
    STRATEGIES,
    agreement,
    autotune,
    build_unverified,
    eager,
)
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.build_result import BuildResult, Choice

# By kind of device. The loop comes first: it is the baseline. Then the likely winners, so that the
# comparisons with the others end early; where builds are slow, the quick ones, so that an exhausted
# budget skips the fewest.
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
        "cudagraph_loop",
        "cudagraph_vmap",
        "cudagraph_concurrent",
        "lowered_vmap",
        "cudagraph_compiled_concurrent",
        "cudagraph_compiled_im2col_vmap",
    ),
}
OTHER_DEVICES = ("loop", "folded_loop", "folded_vmap", "concurrent", "vmap")
OWN_SHARE = 0.25  # of the autotuning budget, for a candidate that autotunes itself
# Peak memory of a build relative to the models' weights, at most: `lowered_vmap` of four ResNet-18
# held 917 MB, their weights 187 MB.
PEAK_TO_WEIGHTS = 5


def fastest(models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float) -> BuildResult:
    """The fastest candidate for the example; all others are released.

    Candidates must agree with the logits of the loop in float32, as in the benchmark.
    """
    begin = time.perf_counter()
    names = candidates(example.device, weight_dtype(models, example))
    x = agreement.informative(example)
    share = OWN_SHARE * tune_seconds
    found = autotune.select_fastest(
        {
            name: partial(build_unverified, name, models, example, tune_seconds=share)
            for name in names
        },
        x,
        check=_checker(models, x),
        seconds=tune_seconds,
        bytes_each=PEAK_TO_WEIGHTS * sum(map(stacking.weight_bytes, models)),
    )
    assert found.built is not None
    tuning_s = time.perf_counter() - begin - found.build_s[found.name]
    errors = {name: first_line(error) for name, error in found.errors.items()}
    choice = Choice(found.name, found.tried, tuning_s, found.times_s, errors)
    return replace(found.built, choice=choice)


def candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of the candidates on a device, in order.

    If the CPU emulates the dtype, only the strategies with kernels of this package, which compute
    in float32, can beat the loop: all others convert every element in every operator.
    """
    names = CANDIDATES.get(device.type, OTHER_DEVICES)
    if not is_emulated(dtype, device):
        return names
    return tuple(name for name in names if name == LOOP or STRATEGIES[name].has_kernels)


def _checker(models: Sequence[nn.Module], x: Tensor) -> Callable[[Tensor], None]:
    """A function that raises ValueError for logits that disagree with the loop in float32.

    On CUDA the loop multiplies in IEEE float32, the candidates in the precision of the caller.
    """
    dtype = weight_dtype(models, x)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    limit = agreement.current_tolerance(dtype, x.device)
    reference = eager.logits_in(models, x, at_least_float32)
    has_classes = is_class_logits(reference, class_count(models[0]))
    agrees = partial(agreement.check, tolerance=limit, nan_agrees=True, has_classes=has_classes)
    own = reference if dtype == at_least_float32 else eager.logits_in(models[:1], x, dtype)

    def check(logits: Tensor) -> None:
        if logits.dtype != own.dtype:
            raise ValueError(f"expected logits in {own.dtype}, got {logits.dtype}")
        problem = agrees(logits, reference).problem
        if not problem:
            return
        if agrees(eager.logits_in(models, x, at_least_float32), reference).problem:
            raise ValueError(
                "models: expected deterministic outputs, got models that are random in eval mode"
                " (active dropout?)"
            )
        raise ValueError(problem)

    return check
