"""Reductions of an ensemble's outputs: none, or the mean over the models.

The mean of class logits is that of the models' probabilities; of any other output (segmentation
maps, embeddings, regression) it is that of the outputs themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble.models.outputs import is_class_logits
from ensemble.strategies.build_result import ForwardFn

REDUCTIONS = ("none", "mean")


def reduce_logits(logits: Tensor, how: str, *, has_classes: bool = True) -> Tensor:
    """Outputs `(N, B, ...)` unchanged for `none`, their mean `(B, ...)` for `mean`.

    has_classes: they are class logits `(N, B, classes)`, whose probabilities are averaged.

    Raises:
        ValueError: an unknown reduction.
    """
    if how == "none":
        return logits
    return summands(logits, how, has_classes=has_classes).sum(0) / len(logits)


def summands(outputs: Tensor, how: str, *, has_classes: bool = True) -> Tensor:
    """What is summed over the models, `(N, B, ...)`: probabilities of class logits, others as they
    are; of 16 bits and of integers in float32, as sums round."""
    if how != "mean":
        raise ValueError(f"expected a reduction of {', '.join(REDUCTIONS)}, got {how!r}")
    is_wide = outputs.dtype == torch.float64 or outputs.is_complex()
    values = outputs if is_wide else outputs.float()
    return values.softmax(-1) if has_classes else values


def with_reduction(forward: ForwardFn, how: str, *, classes: int | None) -> ForwardFn:
    """The forward of a strategy, followed by the reduction.

    classes: the number of classes of the models, None if they are no classifiers.
    """
    if how == "none":
        return forward

    @torch.inference_mode()
    def reduced(x: Tensor) -> Tensor:
        outputs = forward(x)
        return reduce_logits(outputs, how, has_classes=is_class_logits(outputs, classes))

    return reduced
