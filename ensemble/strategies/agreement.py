"""Do a strategy's logits agree with the reference's? Asked before anything is timed."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ensemble.strategies.reduction import reduced

# Largest max_rel_error that counts as the same computation, by the strategy's dtype.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 3e-2,
}
# What rounding may do to a logit whatever the image: so many units in the last place of the model's
# largest logit, in float32 1.5e-5 of it. Images whose logits were made to cancel were off by 2.4e-6
# at most, in ResNet-152 by Winograd's kernels.
ROUNDING = 2**7


@dataclass(frozen=True)
class Check:
    """How a strategy's logits compare with the reference's; `problem` is None where they agree."""

    max_rel_error: float | None
    top1: list[list[int]] | None
    top1_agreement: float | None
    problem: str | None


def check(
    logits: Tensor, reference: Tensor, *, tolerance: float, nan_agrees: bool = False
) -> Check:
    """Compare logits with the reference's, both `(N, B, classes)`, model by model by index.

    Outputs of other shapes, `(N, B, ...)`, count as if all that belongs to an image were classes.
    Integers and booleans must be equal. An infinity agrees with the same one (a masked class), a
    NaN with a NaN where `nan_agrees`; otherwise a NaN of the reference's own is the problem.

    max_rel_error is the largest over the models of max abs(logits - reference) / max abs(reference)
    of that model; above `tolerance` the model disagrees. An image whose own logits are small is
    held to `tolerance` of its own largest logit, which is stricter, down to `ROUNDING` of the
    model's: where large terms cancel, small logits keep rounding errors of the model's size, and
    in 16 bits these are larger than any stricter limit. A class that is not the reference's own
    counts as a disagreement, unless the reference holds the two classes for equal to within that
    same limit.
    """
    if logits.shape != reference.shape:
        expected, found = tuple(reference.shape), tuple(logits.shape)
        return Check(None, None, None, f"expected logits of shape {expected}, found {found}")
    if not reference.numel():
        return Check(0.0, None, None, None)
    if not (logits.is_floating_point() or logits.is_complex()):
        return _check_equal(logits, reference)
    rounding = ROUNDING * torch.finfo(logits.dtype).eps
    logits, reference = _by_images(logits), _by_images(reference)
    if reference.isnan().any() and not nan_agrees:
        return Check(None, None, None, "the reference's own logits are not finite: bad weights?")
    top1, of_reference = logits.argmax(-1), reference.argmax(-1)
    alike = (logits == reference) | (logits.isnan() & reference.isnan())
    is_special = ~reference.isfinite() & alike
    logits, reference = (t.masked_fill(is_special, 0) for t in (logits, reference))
    if not reference.isfinite().all():
        return Check(None, None, None, "outputs disagree: not finite in other places")
    of_images = reference.abs().amax(2)
    # All logits 0: only 0 agrees.
    of_models = of_images.amax(1, keepdim=True).clamp_min(torch.finfo(reference.dtype).tiny)
    limits = (tolerance * of_images).maximum(min(tolerance, rounding) * of_models)
    errors = (logits - reference).abs().amax(2)
    relative = (errors / of_models).amax(1)
    agrees = bool((errors <= limits).all())
    problem = (
        _other_class(logits, reference, limits)
        if agrees
        else _excess(relative, errors / of_models, limits / of_models, tolerance)
    )
    return Check(
        max_rel_error=None if relative.isnan().any() else float(relative.max()),
        top1=top1.tolist(),
        top1_agreement=float((top1 == of_reference).double().mean()),
        problem=problem and f"outputs disagree: {problem}",
    )


def _check_equal(found: Tensor, expected: Tensor) -> Check:
    """Of numbers that are not rounded: class indices, masks."""
    found, expected = found.cpu(), expected.cpu()
    different = (found != expected).flatten(1).sum(1) if found.dim() > 1 else found != expected
    if not different.any():
        return Check(0.0, None, 1.0, None)
    model = int(different.argmax())
    count = f"{int(different[model])} of {found[model].numel()} values"
    return Check(None, None, None, f"outputs disagree: model {model} in {count}")


def _by_images(outputs: Tensor) -> Tensor:
    """`(N, B, ...)` in float64 on the CPU, as `(N, B, all that belongs to an image)`."""
    outputs = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    lead = (*outputs.shape, 1)[:2]
    return outputs.cpu().double().reshape(*lead, -1)


def informative(example: Tensor) -> Tensor:
    """The example, or noise where it is the same everywhere: a blank one shows no error."""
    if not example.is_floating_point() or type(example) is not Tensor:
        return example
    if example.numel() > 1 and example.double().std() > 0:
        return example
    generator = torch.Generator(example.device).manual_seed(0)  # leaves the caller's alone
    options: Any = {"dtype": example.dtype, "device": example.device}
    return torch.randn(example.shape, generator=generator, **options)


def check_served(served: Tensor, reference: Tensor, *, reduce: str, tolerance: float) -> Check:
    """Compare what a call serves with what is to be made of the reference's logits.

    Args:
        served: logits `(N, B, classes)`, or their mean `(B, classes)`, see `strategies.reducing`.
        reference: the reference's logits `(N, B, classes)`.
        tolerance: for logits. Where each is off by d at most, a probability is off by
            expm1(2 d) of itself at most, and so is a mean of probabilities.
    """
    if reduce == "none":
        return check(served, reference, tolerance=tolerance)
    expected = reduced(reference.double(), reduce)
    largest = float(reference.abs().max())
    limit = math.expm1(min(2 * tolerance * largest, 1.0)) if math.isfinite(largest) else tolerance
    found = check(served.unsqueeze(0), expected.unsqueeze(0), tolerance=limit)
    problem = found.problem and found.problem.replace("model 0", "the mean over the models")
    return replace(found, problem=problem)


def _other_class(logits: Tensor, reference: Tensor, limits: Tensor) -> str | None:
    """The first image whose class the reference holds for less than its own by more than `limits`
    `(N, B)`."""
    found = logits.argmax(-1)
    margins = reference.amax(-1) - reference.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    wrong = (margins > limits).nonzero().tolist()
    if not wrong:
        return None
    model, image = wrong[0]
    expected = reference[model, image].argmax()
    classes = f"{found[model, image]} where the reference has {expected}"
    return f"model {model} predicts class {classes} for image {image}"


def _excess(models: Tensor, images: Tensor, limits: Tensor, tolerance: float) -> str:
    """Which model is off, or where none is as a whole, which image of it.

    Errors `(N,)` and `(N, B)` and limits `(N, B)`, all in parts of the model's largest logit.
    """
    model = int(models.nan_to_num(torch.inf).argmax())
    if not models[model] <= tolerance:
        off = f"{models[model]:.1e} of its largest logit"
        return f"model {model} is off by {off}, limit {tolerance:.0e}"
    model, image = divmod(int((images / limits).argmax()), images.shape[1])
    off = f"{images[model, image]:.1e} of its largest logit for image {image}, whose own are small"
    return f"model {model} is off by {off}, limit {limits[model, image]:.0e}"
