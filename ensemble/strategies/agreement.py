"""Check a strategy's logits against the reference's, before anything is timed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ensemble.machine.dtypes import NumericFormat
from ensemble.machine.precision import Float32Precision, current_float32_precision
from ensemble.strategies.reduction import reduce_logits

# Maximum max_rel_error of the same computation, by the strategy's dtype.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 3e-2,
}
# Of float32 where CUDA multiplies in TF32, which rounds factors to 10 bits of mantissa: expected
# errors of ResNets are about 3e-4.
TF32_TOLERANCE, TF32_EPS = 1e-3, 2.0**-10
# Rounding error allowed in any logit, in units in the last place of the model's largest logit:
# 1.5e-5 of it in float32. Images constructed so that their logits cancel had errors of up to 2.4e-6
# (ResNet-152, Winograd kernels).
ROUNDING = 2**7


def tolerance_of(numbers: NumericFormat) -> float:
    """Maximum max_rel_error of a row in a numeric format."""
    return TF32_TOLERANCE if numbers.uses_tf32 else TOLERANCES[numbers.dtype]


def current_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The tolerance of forwards in a dtype, in the precision that this process has set."""
    uses_tf32 = (
        device.type == "cuda"
        and dtype == torch.float32
        and current_float32_precision() is Float32Precision.TF32
    )
    return TF32_TOLERANCE if uses_tf32 else TOLERANCES[dtype]


@dataclass(frozen=True)
class Check:
    """The comparison of a strategy's logits with the reference's; without `problem` they agree."""

    max_rel_error: float | None
    top1: list[list[int]] | None
    top1_agreement: float | None
    problem: str | None


def check(
    logits: Tensor,
    reference: Tensor,
    *,
    tolerance: float,
    nan_agrees: bool = False,
    has_classes: bool = True,
) -> Check:
    """Compare logits with the reference's, both `(N, B, classes)`, per model.

    Outputs of other shapes, `(N, B, ...)`, are flattened to `(N, B, values)`; of these, and without
    `has_classes` (embeddings), no class is compared, and there is no top-1. Integers and
    booleans must be equal. Infinities agree with infinities of the same sign (masked classes), NaN
    with NaN if `nan_agrees`; otherwise a NaN in the reference is reported as the problem.

    max_rel_error is the maximum over the models of max abs(logits - reference) / max abs(reference)
    of that model; above `tolerance` the model disagrees. An image with small logits is compared
    with `tolerance` times its own largest logit, which is stricter, but not below `ROUNDING` of the
    model's: where large terms cancel, small logits carry rounding errors of the model's magnitude,
    and in 16 bits these exceed any stricter limit. A different top-1 class is a disagreement,
    unless the reference's logits of the two classes are equal to within the same limit.
    """
    if logits.shape != reference.shape:
        expected, found = tuple(reference.shape), tuple(logits.shape)
        return Check(None, None, None, f"expected logits of shape {expected}, got {found}")
    if not reference.numel():
        return Check(0.0, None, None, None)
    if not (logits.is_floating_point() or logits.is_complex()):
        return _check_equal(logits, reference)
    rounding = ROUNDING * _eps(logits.dtype, tolerance)
    has_classes = has_classes and logits.dim() == 3 and logits.shape[2] > 1
    logits, reference = _by_images(logits), _by_images(reference)
    if reference.isnan().any() and not nan_agrees:
        return Check(None, None, None, "the reference's logits are not finite; invalid weights?")
    top1, of_reference = logits.argmax(-1), reference.argmax(-1)
    equal = (logits == reference) | (logits.isnan() & reference.isnan())
    is_special = ~reference.isfinite() & equal
    logits, reference = (t.masked_fill(is_special, 0) for t in (logits, reference))
    if not reference.isfinite().all():
        return Check(None, None, None, "outputs disagree: different elements are not finite")
    of_images = reference.abs().amax(2)
    # If all logits are 0, only 0 agrees.
    of_models = of_images.amax(1, keepdim=True).clamp_min(torch.finfo(reference.dtype).tiny)
    limits = (tolerance * of_images).maximum(min(tolerance, rounding) * of_models)
    errors = (logits - reference).abs().amax(2)
    relative = (errors / of_models).amax(1)
    agrees = bool((errors <= limits).all())
    problem = None
    if not agrees:
        problem = _largest_error(relative, errors / of_models, limits / of_models, tolerance)
    elif has_classes:
        problem = _class_mismatch(logits, reference, limits)
    return Check(
        max_rel_error=None if relative.isnan().any() else float(relative.max()),
        top1=top1.tolist() if has_classes else None,
        top1_agreement=float((top1 == of_reference).double().mean()) if has_classes else None,
        problem=problem and f"outputs disagree: {problem}",
    )


def _eps(dtype: torch.dtype, tolerance: float) -> float:
    """The relative unit in the last place of logits; with the tolerance of TF32, of its factors."""
    is_tf32 = dtype == torch.float32 and tolerance == TF32_TOLERANCE
    return TF32_EPS if is_tf32 else torch.finfo(dtype).eps


def _check_equal(found: Tensor, expected: Tensor) -> Check:
    """Compare integers and booleans: class indices, masks."""
    found, expected = found.cpu(), expected.cpu()
    different = (found != expected).flatten(1).sum(1) if found.dim() > 1 else found != expected
    if not different.any():
        return Check(0.0, None, None, None)
    model = int(different.argmax())
    count = f"{int(different[model])} of {found[model].numel()} values"
    return Check(None, None, None, f"outputs disagree: model {model} differs in {count}")


def _by_images(outputs: Tensor) -> Tensor:
    """`(N, B, ...)` in float64 on the CPU, flattened to `(N, B, classes)`."""
    outputs = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    lead = (*outputs.shape, 1)[:2]
    return outputs.cpu().double().reshape(*lead, -1)


def informative(example: Tensor) -> Tensor:
    """The example, or noise if the example is constant, which would hide errors."""
    if not example.is_floating_point() or type(example) is not Tensor:
        return example
    if example.numel() > 1 and example.double().std() > 0:
        return example
    return noise(example.shape, example.dtype, example.device)


def noise(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images to compare outputs on: normally distributed, or integers from 0 to 127."""
    generator = torch.Generator(device).manual_seed(0)  # not the global generator
    options: Any = {"dtype": dtype, "device": device, "generator": generator}
    if dtype.is_floating_point:
        return torch.randn(shape, **options)
    return torch.randint(0, 2 if dtype == torch.bool else 128, tuple(shape), **options)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Are tensors equal, bit for bit? NaN equals NaN."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def largest_of(outputs: Tensor) -> float:
    """The largest absolute value; 0 if there is none."""
    sizes = outputs.abs() if outputs.is_complex() else outputs.float().abs()
    return float(sizes.max()) if sizes.numel() else 0.0


def check_reduced(
    result: Tensor,
    reference: Tensor,
    *,
    reduce: str,
    tolerance: float,
    has_classes: bool = True,
) -> Check:
    """Compare the reduced output of a strategy with the reduced logits of the reference.

    Args:
        result: logits `(N, B, classes)`, or mean probabilities `(B, classes)`, see
            `strategies.reduction`.
        reference: the reference's logits `(N, B, classes)`.
        tolerance: of logits. If every logit has an absolute error of at most d, probabilities and
            their means have a relative error of at most expm1(2 d).
        has_classes: see `check`; of other outputs the mean has an absolute error of at most d.
    """
    expected = reference
    if reduce != "none":
        wide = reference if reference.is_complex() else reference.double()
        expected = reduce_logits(wide, reduce, has_classes=has_classes)
    largest = largest_of(reference)
    return check_same(
        result,
        expected,
        reduce=reduce,
        tolerance=tolerance,
        largest=largest,
        has_classes=has_classes,
    )


def check_same(
    result: Tensor,
    expected: Tensor,
    *,
    reduce: str,
    tolerance: float,
    largest: float,
    has_classes: bool = True,
) -> Check:
    """Compare two outputs of the same reduction.

    Args:
        result: as in `check_reduced`.
        expected: the reference's, reduced likewise.
        tolerance: as in `check_reduced`.
        largest: the largest absolute logit.
        has_classes: see `check`.
    """
    if reduce == "none":
        return check(result, expected, tolerance=tolerance, has_classes=has_classes)
    limit = math.expm1(min(2 * tolerance * largest, 1.0)) if math.isfinite(largest) else tolerance
    if not has_classes:  # where the outputs of the models cancel, their errors do not
        mean = largest_of(expected)
        limit = (
            min(tolerance * largest / mean, 1.0) if mean and math.isfinite(largest) else tolerance
        )
    found = check(
        result.unsqueeze(0), expected.unsqueeze(0), tolerance=limit, has_classes=has_classes
    )
    problem = found.problem and found.problem.replace("model 0", "the mean over models")
    return replace(found, problem=problem)


def _class_mismatch(logits: Tensor, reference: Tensor, limits: Tensor) -> str | None:
    """The first image whose top-1 class differs, by a margin of the reference's logits above
    `limits` `(N, B)`."""
    found = logits.argmax(-1)
    margins = reference.amax(-1) - reference.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    wrong = (margins > limits).nonzero().tolist()
    if not wrong:
        return None
    model, image = wrong[0]
    expected = reference[model, image].argmax()
    classes = f"{found[model, image]}, the reference {expected},"
    return f"model {model} predicts class {classes} for image {image}"


def _largest_error(models: Tensor, images: Tensor, limits: Tensor, tolerance: float) -> str:
    """The model with the largest error; if no model exceeds the tolerance, the image that exceeds
    its own limit most.

    Errors `(N,)` and `(N, B)` and limits `(N, B)`, all relative to the model's largest logit.
    """
    model = int(models.nan_to_num(torch.inf).argmax())
    if not models[model] <= tolerance:
        error = f"{models[model]:.1e} of its largest logit"
        return f"model {model} has an error of {error}, tolerance {tolerance:.0e}"
    model, image = divmod(int((images / limits).argmax()), images.shape[1])
    error = f"{images[model, image]:.1e} of its largest logit for image {image} with small logits"
    return f"model {model} has an error of {error}, tolerance {limits[model, image]:.0e}"
