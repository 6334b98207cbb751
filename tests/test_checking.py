import pytest
import torch
from torch import Tensor

from ensemble.checking import check

REFERENCE = torch.tensor([[[1.0, 4.0, 2.0]], [[8.0, 0.0, 4.0]]])  # 2 models, 1 image, 3 classes


def changed(model: int, image: int, label: int, value: float) -> Tensor:
    logits = REFERENCE.clone()
    logits[model, image, label] = value
    return logits


def test_the_error_is_the_largest_difference_over_the_largest_reference():
    found = check(changed(0, 0, 1, 4.002), REFERENCE, tolerance=1e-3)
    assert found.max_rel_error == pytest.approx(0.002 / 8, rel=1e-3)
    assert found.top1 == [[1], [0]]
    assert found.top1_agreement == 1.0
    assert found.problem is None


def test_an_error_above_the_tolerance_names_the_model_and_the_limit():
    found = check(changed(1, 0, 2, 4.1), REFERENCE, tolerance=1e-3)
    assert found.problem == (
        "outputs disagree: model 1 is off by 1.2e-02 of the largest logit, limit 1e-03"
    )


def test_a_swapped_pair_of_models_is_caught():
    assert check(REFERENCE.flip(0), REFERENCE, tolerance=3e-2).problem is not None


def test_a_swapped_pair_of_images_is_caught():
    reference = REFERENCE.transpose(0, 1)
    assert check(reference.flip(1), reference, tolerance=3e-2).problem is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_disagree(value: float):
    found = check(changed(1, 0, 0, value), REFERENCE, tolerance=1e-4)
    assert found.problem is not None
    assert "model 1" in found.problem


def test_another_class_disagrees_unless_the_reference_holds_the_two_for_equal():
    reference = torch.tensor([[[10.0, 9.9]]])
    logits = torch.tensor([[[9.95, 9.96]]])
    assert check(logits, reference, tolerance=1.1e-2).problem is None
    found = check(logits, reference, tolerance=0.9e-2)
    assert found.top1_agreement == 0.0
    assert (
        found.problem == "outputs disagree: model 0 predicts class 1 where the reference has 0"
        " for image 0"
    )


def test_logits_of_another_shape_disagree():
    found = check(REFERENCE[:1], REFERENCE, tolerance=1e-4)
    assert found.problem == "expected logits of shape (2, 1, 3), found (1, 1, 3)"


def test_logits_that_are_all_zero_agree_with_zeros_alone():
    zeros = torch.zeros(2, 1, 3)
    assert check(zeros, zeros, tolerance=1e-4).problem is None
    assert check(zeros + 1e-9, zeros, tolerance=1e-4).problem is not None


def test_a_reference_that_is_not_finite_is_blamed_itself():
    broken = changed(0, 0, 0, float("nan"))
    found = check(broken, broken, tolerance=1e-4)
    assert found.problem == "the reference's own logits are not finite: bad weights?"
    assert found.top1_agreement is None
