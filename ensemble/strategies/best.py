"""`best`: the strategy that is expected to be the fastest, by a short table with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from ensemble.errors import UnavailableError
from ensemble.models.stacking import skeleton
from ensemble.passes.packing import why_not
from ensemble.passes.tracing import traced


@dataclass(frozen=True)
class Rule:
    """Where a strategy is expected to win. None stands for anything."""

    strategy: str
    device: str | None = None
    dtype: str | None = None
    has_kernels: bool | None = None  # are its convolutions more to `ensemble.ops` than to torch?
    most_models: int | None = None
    evidence: str = "not measured"


# The first that fits is taken. Evidence: result files, of which a test asks that what a rule picks
# is within 5 % of the fastest row for its N.
RULES = (
    Rule("lowered_vmap", "cpu", "float32", True, evidence="tests/data/float32_*.json"),
    Rule("lowered_vmap", "cpu", "bfloat16", True, evidence="tests/data/bfloat16_*.json"),
    Rule("prepacked_concurrent", "cpu", evidence="tests/data/bfloat16_*.json"),
    Rule(
        "cudagraph_compiled_im2col_vmap", "cuda", "float32", True, evidence="tests/data/cuda_*.json"
    ),
    Rule(
        "cudagraph_compiled_im2col_vmap", "cuda", None, True, 4, evidence="tests/data/cuda_*.json"
    ),
    Rule("cudagraph_compiled_concurrent", "cuda", evidence="tests/data/cuda_*.json"),
    Rule("folded_loop"),
)


def pick(models: Sequence[nn.Module], device: str, dtype: str) -> str:
    """The name of the strategy that the table gives for these models, of those that can run."""
    try:
        traced(skeleton(models[0]))
    except UnavailableError:
        return "loop"  # what all else is made of
    has_kernels = _has_kernels(models[0], device, dtype)
    for rule in RULES:
        asked = (rule.device, rule.dtype, rule.has_kernels)
        fits = all(
            own is None or own == found
            for own, found in zip(asked, (device, dtype, has_kernels), strict=True)
        )
        runs = rule.strategy != "prepacked_concurrent" or not why_not(device, getattr(torch, dtype))
        if fits and runs and (rule.most_models is None or len(models) <= rule.most_models):
            return rule.strategy
    raise AssertionError("the last rule fits everything")


def _has_kernels(model: nn.Module, device: str, dtype: str) -> bool:
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    plain = bool(convolutions) and all(conv.groups == 1 for conv in convolutions)
    if device != "cpu":
        return plain
    # A panel of the kernels has at most 32 columns: to know it would take importing numba.
    whole = all(conv.out_channels % 32 == 0 for conv in convolutions)
    if not plain or not whole or find_spec("numba") is None:
        return False
    return dtype != "bfloat16" or _multiplies_pairs_best()


def _multiplies_pairs_best() -> bool:
    """Does this CPU multiply pairs of bfloat16, and have no matrix unit, which oneDNN knows?"""
    from ensemble.ops.simd import HAS_PAIRS

    has_matrix_unit = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return HAS_PAIRS and not has_matrix_unit()
