"""What an ensemble serves of its logits: all of them, or the mean of the models' probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble.strategies.build_result import Forward

REDUCTIONS = ("none", "mean")


def reduced(logits: Tensor, how: str) -> Tensor:
    """Logits `(N, B, classes)` as they are, or for `mean` probabilities `(B, classes)`.

    Raises:
        ValueError: an unknown reduction.
    """
    if how == "none":
        return logits
    return probabilities(logits, how).sum(0) / len(logits)


def probabilities(logits: Tensor, how: str) -> Tensor:
    """Probabilities `(N, B, classes)` of logits, of 16 bits in float32: a sum of many rounds."""
    if how != "mean":
        raise ValueError(f"expected a reduction out of {', '.join(REDUCTIONS)}, found {how!r}")
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)


def served(forward: Forward, how: str) -> Forward:
    """The forward of a strategy, with its logits reduced."""
    if how == "none":
        return forward
    return torch.inference_mode()(lambda x: reduced(forward(x), how))
