"""Reductions of an ensemble's logits: none, or the mean of the models' probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble.strategies.build_result import ForwardFn

REDUCTIONS = ("none", "mean")


def reduce_logits(logits: Tensor, how: str) -> Tensor:
    """Logits `(N, B, classes)` unchanged for `none`, probabilities `(B, classes)` for `mean`.

    Raises:
        ValueError: an unknown reduction.
    """
    if how == "none":
        return logits
    return probabilities(logits, how).sum(0) / len(logits)


def probabilities(logits: Tensor, how: str) -> Tensor:
    """Probabilities `(N, B, classes)` of logits; of 16-bit logits in float32, as sums round."""
    if how != "mean":
        raise ValueError(f"expected a reduction of {', '.join(REDUCTIONS)}, got {how!r}")
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)


def with_reduction(forward: ForwardFn, how: str) -> ForwardFn:
    """The forward of a strategy, followed by the reduction."""
    if how == "none":
        return forward
    return torch.inference_mode()(lambda x: reduce_logits(forward(x), how))
