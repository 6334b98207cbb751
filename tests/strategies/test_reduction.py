"""The mean of probabilities, and its comparison with the reference."""

from functools import partial

import pytest
import torch

from ensemble.strategies.agreement import check_reduced
from ensemble.strategies.reduction import reduce_logits, with_reduction

LOGITS = torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[0.0, torch.tensor(3.0).log()], [0.0, 0.0]]])


def test_the_mean_is_of_probabilities_over_the_models() -> None:
    # image 0: (1/2, 1/2) and (1/4, 3/4); image 1: (1/2, 1/2) twice
    assert reduce_logits(LOGITS, "mean").tolist() == [
        pytest.approx([0.375, 0.625]),
        pytest.approx([0.5, 0.5]),
    ]
    assert reduce_logits(LOGITS, "none") is LOGITS
    assert (
        with_reduction(lambda x: x, "mean", classes=LOGITS.shape[2])(LOGITS).tolist()
        == reduce_logits(LOGITS, "mean").tolist()
    )


def test_sixteen_bit_logits_are_summed_in_float32_and_unknown_reductions_raise() -> None:
    assert reduce_logits(LOGITS.bfloat16(), "mean").dtype == torch.float32
    with pytest.raises(ValueError, match="expected a reduction of none, mean, got 'max'"):
        reduce_logits(LOGITS, "max")


def test_a_mean_is_compared_with_the_means_of_the_reference() -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    right = reduce_logits(logits, "mean")
    assert check_reduced(right, logits, reduce="mean", tolerance=1e-4).problem is None
    of_two = reduce_logits(logits[:2], "mean")
    found = check_reduced(of_two, logits, reduce="mean", tolerance=1e-4).problem
    assert found is not None
    assert found.startswith("outputs disagree: the mean over models has an error of")


def test_the_mean_of_other_outputs_is_that_of_the_outputs() -> None:
    maps = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    mean = reduce_logits(maps, "mean", has_classes=False)
    torch.testing.assert_close(mean, maps.mean(0))
    assert torch.equal(with_reduction(lambda x: x, "mean", classes=4)(maps), mean)
    assert torch.equal(with_reduction(lambda x: x, "mean", classes=None)(LOGITS), LOGITS.mean(0))
    masks = torch.tensor([[True, False]], dtype=torch.bool)
    assert reduce_logits(masks, "mean", has_classes=False).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_mean_of_outputs_has_the_tolerance_of_the_outputs_where_they_cancel(shift: float) -> None:
    one = torch.randn(1, 2, 4, 3, 3, generator=torch.Generator().manual_seed(2)) + shift
    outputs = torch.cat([one, 1e-3 - one])  # the mean is 5e-4
    check = partial(check_reduced, reduce="mean", tolerance=1e-4, has_classes=False)
    right = reduce_logits(outputs, "mean", has_classes=False)
    error = torch.zeros_like(right)
    error[1, 2, 0, 1] = 1e-4 * float(outputs.abs().max())
    assert check(right + 0.5 * error, outputs).problem is None
    found = check(right + 3 * error, outputs).problem
    assert found is not None
    assert found.startswith("outputs disagree: the mean over models has an error of")
    assert check(right + 0.5 * error, outputs).top1 is None
