"""Agreement of logits: planted faults are detected, rounding is accepted."""

from functools import partial

import pytest
import torch
from torch import Tensor

from ensemble.machine.precision import Float32Precision, float32_precision
from ensemble.strategies import agreement
from ensemble.strategies.agreement import TOLERANCES, check, check_same

REFERENCE = torch.tensor([[[1.0, 4.0, 2.0]], [[8.0, 0.0, 4.0]]])  # 2 models, 1 image, 3 classes


def changed(model: int, image: int, label: int, value: float) -> Tensor:
    logits = REFERENCE.clone()
    logits[model, image, label] = value
    return logits


def test_the_error_is_the_largest_difference_over_the_largest_reference_of_the_model() -> None:
    found = check(changed(0, 0, 1, 4.002), REFERENCE, tolerance=1e-3)
    assert found.max_rel_error == pytest.approx(0.002 / 4, rel=1e-3)
    assert found.top1 == [[1], [0]]
    assert found.top1_agreement == 1.0
    assert found.problem is None


def test_an_error_above_the_tolerance_names_the_model_and_the_limit() -> None:
    found = check(changed(1, 0, 2, 4.1), REFERENCE, tolerance=1e-3)
    assert found.problem == (
        "outputs disagree: model 1 has an error of 1.2e-02 of its largest logit, tolerance 1e-03"
    )


def test_the_error_and_the_verdict_are_those_of_the_worst_image() -> None:
    reference = REFERENCE.transpose(0, 1)  # 1 model, 2 images
    logits = reference.clone()
    logits[0, 1, 2] += 0.08  # of 8, in the second image
    found = check(logits, reference, tolerance=1e-3)
    assert found.max_rel_error == pytest.approx(0.01, rel=1e-3)
    assert found.problem is not None


def test_integers_must_be_equal() -> None:
    labels = torch.tensor([[3, 5], [7, 2]])
    assert check(labels.clone(), labels, tolerance=1.0).problem is None
    found = check(torch.tensor([[3, 5], [7, 1]]), labels, tolerance=1.0)
    assert found.problem == "outputs disagree: model 1 differs in 1 of 2 values"


def test_masked_classes_agree_if_their_infinities_have_the_same_sign() -> None:
    masked = changed(1, 0, 1, -torch.inf)
    assert check(masked.clone(), masked, tolerance=1e-4).problem is None
    found = check(changed(1, 0, 1, torch.inf), masked, tolerance=1e-4)
    assert found.problem == "outputs disagree: different elements are not finite"


def test_mean_probabilities_have_the_tolerance_that_an_error_of_every_logit_gives_them() -> None:
    """Logits of up to 50, each off by 1e-4 of that, 0.005: probabilities by expm1(0.01)."""
    expected = torch.tensor([[0.75, 0.25]])
    for factor, agrees in ((1.0099, True), (1.0102, False)):
        found = check_same(expected * factor, expected, reduce="mean", tolerance=1e-4, largest=50.0)
        assert (found.problem is None) == agrees
    assert found.problem is not None
    assert found.problem.startswith(
        "outputs disagree: the mean over models has an error of 1.0e-02"
    )


def test_a_swapped_pair_of_models_is_caught() -> None:
    assert check(REFERENCE.flip(0), REFERENCE, tolerance=3e-2).problem is not None


def test_a_swapped_pair_of_images_is_caught() -> None:
    reference = REFERENCE.transpose(0, 1)
    assert check(reference.flip(1), reference, tolerance=3e-2).problem is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_disagree(value: float) -> None:
    found = check(changed(1, 0, 0, value), REFERENCE, tolerance=1e-4)
    assert found.problem is not None
    assert "model 1" in found.problem


def test_another_class_disagrees_unless_the_reference_logits_are_nearly_equal() -> None:
    reference = torch.tensor([[[10.0, 9.9]]])
    logits = torch.tensor([[[9.95, 9.96]]])
    assert check(logits, reference, tolerance=1.1e-2).problem is None
    found = check(logits, reference, tolerance=0.9e-2)
    assert found.top1_agreement == 0.0
    assert (
        found.problem == "outputs disagree: model 0 predicts class 1, the reference 0, for image 0"
    )


def test_logits_of_another_shape_disagree() -> None:
    found = check(REFERENCE[:1], REFERENCE, tolerance=1e-4)
    assert found.problem == "expected logits of shape (2, 1, 3), got (1, 1, 3)"


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5, 6)])
def test_outputs_other_than_logits_are_compared_per_image(shape: tuple[int, ...]) -> None:
    reference = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1
    assert check(reference.clone(), reference, tolerance=1e-4).problem is None
    wrong = reference.clone()
    wrong[1, 2] *= 1.01
    found = check(wrong, reference, tolerance=1e-4)
    assert found.problem is not None
    assert "model 1" in found.problem


def test_all_zero_logits_agree_only_with_zeros() -> None:
    zeros = torch.zeros(2, 1, 3)
    assert check(zeros, zeros, tolerance=1e-4).problem is None
    assert check(zeros + 1e-9, zeros, tolerance=1e-4).problem is not None


def test_a_reference_that_is_not_finite_is_reported() -> None:
    broken = changed(0, 0, 0, float("nan"))
    found = check(broken, broken, tolerance=1e-4)
    assert found.problem == "the reference's logits are not finite; invalid weights?"
    assert found.top1_agreement is None


# Planted faults: 16 models whose logits span six decades, 4 images, 10 classes.

SCALES = torch.logspace(3, -3, 16).view(16, 1, 1)
DECADES = torch.randn(16, 4, 10, generator=torch.Generator().manual_seed(0)).double() * SCALES
TOLERANCES_BY_DTYPE = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(dtype, limit) for dtype, limit in TOLERANCES.items()]
)


def planted(model: int, logits: Tensor) -> Tensor:
    """The logits of all models, with those of one replaced."""
    found = DECADES.clone()
    found[model] = logits
    return found


def assert_caught(found: Tensor, model: int, dtype: torch.dtype, tolerance: float) -> None:
    problem = check(found.to(dtype), DECADES, tolerance=tolerance).problem
    assert problem is not None
    assert problem.startswith(f"outputs disagree: model {model} ")
    assert "\n" not in problem


@TOLERANCES_BY_DTYPE
@pytest.mark.parametrize("model", [0, 7, 15])
def test_one_model_of_many_that_is_zero_is_caught(
    model: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_caught(planted(model, torch.zeros(4, 10)), model, dtype, tolerance)


@TOLERANCES_BY_DTYPE
@pytest.mark.parametrize(("model", "other"), [(15, 14), (1, 0), (14, 15)])
def test_a_model_with_the_logits_of_another_is_caught(
    model: int, other: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_caught(planted(model, DECADES[other]), model, dtype, tolerance)


@TOLERANCES_BY_DTYPE
@pytest.mark.parametrize(("model", "other"), [(0, 1), (0, 15), (14, 15)])
def test_two_models_that_are_swapped_are_caught(
    model: int, other: int, dtype: torch.dtype, tolerance: float
) -> None:
    found = planted(model, DECADES[other])
    found[other] = DECADES[model]
    assert check(found.to(dtype), DECADES, tolerance=tolerance).problem is not None


@TOLERANCES_BY_DTYPE
def test_noise_of_ten_times_the_tolerance_in_the_model_with_the_smallest_logits_is_caught(
    dtype: torch.dtype, tolerance: float
) -> None:
    noise = torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) * 2 - 1
    largest = DECADES[15].abs().max()
    found = planted(15, DECADES[15] + 10 * tolerance * largest * noise / noise.abs().max())
    assert_caught(found, 15, dtype, tolerance)
    error = check(found.to(dtype), DECADES, tolerance=tolerance).max_rel_error
    assert error == pytest.approx(10 * tolerance, rel=0.05)


@TOLERANCES_BY_DTYPE
def test_rounding_to_the_dtype_agrees_at_any_scale(dtype: torch.dtype, tolerance: float) -> None:
    assert check(DECADES.to(dtype), DECADES, tolerance=tolerance).problem is None


def test_a_wrong_class_of_a_model_with_small_logits_is_caught() -> None:
    reference = torch.tensor([[[1000.0, 0.0]], [[1e-3, 0.9e-3]]])
    logits = torch.tensor([[[1000.0, 0.0]], [[0.9e-3, 1e-3]]])
    found = check(logits, reference, tolerance=3e-2)
    assert found.problem == (
        "outputs disagree: model 1 has an error of 1.0e-01 of its largest logit, tolerance 3e-02"
    )
    reference[1, 0] = torch.tensor([1e-3, 0.94e-3])  # each within 4 %, 6 % apart
    logits[1, 0] = torch.tensor([0.969e-3, 0.97e-3])
    found = check(logits, reference, tolerance=4e-2)
    assert found.problem == (
        "outputs disagree: model 1 predicts class 1, the reference 0, for image 0"
    )


def test_an_image_with_small_logits_is_compared_at_its_own_scale() -> None:
    reference = torch.tensor([[[100.0, 50.0], [20.0, 30.0]]])
    logits = reference + torch.tensor(
        [[[0.009, 0.0], [0.0, 0.004]]]
    )  # both negligible relative to 100
    found = check(logits, reference, tolerance=1e-4)
    assert found.max_rel_error == pytest.approx(9e-5, rel=1e-3)
    assert found.problem == (
        "outputs disagree: model 0 has an error of 4.0e-05 of its largest logit for image 1"
        " with small logits, tolerance 3e-05"
    )


@pytest.mark.parametrize("small", [0.0, 1e-6, 1e-3])
def test_rounding_errors_of_an_image_whose_logits_cancel_agree(small: float) -> None:
    reference = torch.tensor([[[100.0, 50.0], [small, -small]]])
    noise = torch.tensor([[[0.0, 0.0], [5e-4, -5e-4]]])  # 5e-6 of the model's largest logit
    assert check(reference + noise, reference, tolerance=1e-4).problem is None
    assert check(reference + 4 * noise, reference, tolerance=1e-4).problem is not None


def test_sixteen_bit_logits_are_compared_at_the_scale_of_the_model() -> None:
    reference = torch.tensor([[[100.0, 50.0], [2.0, 1.0]]])
    logits = reference + torch.tensor([[[0.0, 0.0], [2.5, 0.0]]])
    assert check(logits.bfloat16(), reference, tolerance=3e-2).problem is None
    assert check(logits.float(), reference, tolerance=3e-2).problem is not None


def test_a_model_with_all_zero_logits_among_others_agrees_only_with_zeros() -> None:
    reference = DECADES.clone()
    reference[3] = 0.0
    found = reference.clone()
    assert check(found, reference, tolerance=1e-4).problem is None
    found[3, 2, 1] = 1e-12
    assert check(found, reference, tolerance=1e-4).problem is not None


def test_small_logits_of_an_image_carry_tf32s_error_of_the_model() -> None:
    """An error of 3e-4 of the model's largest logit: 3 % of the image's own."""
    reference = torch.tensor([[[1.0, 0.0], [0.01, 0.0]]])
    found = reference + torch.tensor([[[0.0, 0.0], [3e-4, 0.0]]])
    assert check(found, reference, tolerance=agreement.TF32_TOLERANCE).problem is None
    assert check(found, reference, tolerance=TOLERANCES[torch.float32]).problem is not None
    far = reference + torch.tensor([[[2e-3, 0.0], [0.0, 0.0]]])
    assert "tolerance 1e-03" in str(check(far, reference, tolerance=agreement.TF32_TOLERANCE))


@pytest.mark.parametrize(
    ("dtype", "device", "in_tf32"),
    [
        (torch.float32, "cuda", 1e-3),
        (torch.float32, "cpu", 1e-4),
        (torch.bfloat16, "cuda", 3e-2),
        (torch.float64, "cuda", 1e-9),
    ],
)
def test_the_tolerance_follows_the_precision_that_is_set_on_cuda(
    dtype: torch.dtype, device: str, in_tf32: float
) -> None:
    with float32_precision(Float32Precision.TF32):
        assert agreement.current_tolerance(dtype, torch.device(device)) == in_tf32
    with float32_precision(Float32Precision.IEEE):
        assert agreement.current_tolerance(dtype, torch.device(device)) == TOLERANCES[dtype]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 5), (2, 3), (2,), (2, 3, 1)])
def test_outputs_of_other_shapes_are_compared_by_value_without_a_top_1(
    shape: tuple[int, ...],
) -> None:
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = check(reference.clone(), reference, tolerance=1e-4)
    assert (found.max_rel_error, found.top1, found.top1_agreement) == (0.0, None, None)
    assert found.problem is None
    wrong = reference.clone()
    wrong.view(-1)[-1] += 0.1  # of model 1
    problem = check(wrong, reference, tolerance=1e-4).problem
    assert problem is not None
    assert problem.startswith("outputs disagree: model 1 has an error of")


def test_the_largest_value_of_an_embedding_may_be_another_within_the_tolerance() -> None:
    embedding = torch.tensor([[[1.0, 1.015, 0.2]]])
    close = torch.tensor([[[1.01, 1.005, 0.2]]])
    compare = partial(check, close, embedding, tolerance=0.0125)
    as_classes = compare()
    assert (as_classes.problem or "").startswith("outputs disagree: model 0 predicts class 0")
    found = compare(has_classes=False)
    assert (found.problem, found.top1, found.top1_agreement) == (None, None, None)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (torch.tensor([[True, False]]), 1.0),
        (torch.tensor([-7, 3]), 7.0),
        (torch.tensor([3 + 4j]), 5.0),
        (torch.empty(0, 3), 0.0),
    ],
)
def test_the_largest_absolute_value_is_known_of_any_dtype(outputs: Tensor, expected: float) -> None:
    assert agreement.largest_of(outputs) == expected
