"""Do a strategy's logits agree with the reference's? Asked before anything is timed."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest max_rel_error that counts as the same computation, by the strategy's dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass(frozen=True)
class Check:
    """How a strategy's logits compare with the reference's; `problem` is None where they agree."""

    max_rel_error: float | None
    top1: list[list[int]] | None
    top1_agreement: float | None
    problem: str | None


def check(logits: Tensor, reference: Tensor, *, tolerance: float) -> Check:
    """Compare logits with the reference's, both `(N, B, classes)`, model by model by index.

    max_rel_error is max abs(logits - reference) / max abs(reference) over all models. A class that
    is not the reference's own counts as a disagreement, unless the reference itself holds the two
    classes for equal to within the tolerance.
    """
    if logits.shape != reference.shape:
        expected, found = tuple(reference.shape), tuple(logits.shape)
        return Check(None, None, None, f"expected logits of shape {expected}, found {found}")
    logits, reference = logits.cpu().double(), reference.cpu().double()
    scale = reference.abs().max()
    if not scale.isfinite():
        return Check(None, None, None, "the reference's own logits are not finite: bad weights?")
    scale = scale.clamp_min(torch.finfo(reference.dtype).tiny)  # all logits 0: only 0 agrees
    errors = (logits - reference).abs().flatten(1).amax(1) / scale
    found_top1, expected_top1 = logits.argmax(-1), reference.argmax(-1)
    error, worst = (
        (float("nan"), int(errors.isnan().nonzero()[0]))
        if errors.isnan().any()
        else (
            float(errors.max()),
            int(errors.argmax()),
        )
    )
    margin = reference.amax(-1) - reference.gather(-1, found_top1.unsqueeze(-1)).squeeze(-1)
    different = (margin / scale > tolerance).nonzero().tolist()
    problem = None
    if not error <= tolerance:
        problem = f"model {worst} is off by {error:.1e} of the largest logit, limit {tolerance:.0e}"
    elif different:
        model, image = different[0]
        classes = (
            f"{found_top1[model, image]} where the reference has {expected_top1[model, image]}"
        )
        problem = f"model {model} predicts class {classes} for image {image}"
    return Check(
        max_rel_error=error if error == error else None,
        top1=found_top1.tolist(),
        top1_agreement=float((found_top1 == expected_top1).double().mean()),
        problem=problem and f"outputs disagree: {problem}",
    )
