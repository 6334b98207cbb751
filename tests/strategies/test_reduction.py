"""The mean of probabilities, and its comparison with the reference."""

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
        with_reduction(lambda x: x, "mean")(LOGITS).tolist()
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
