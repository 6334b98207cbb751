"""The mean of probabilities, by values, and how it is checked against the loop's."""

import pytest
import torch

from ensemble.strategies.agreement import check_served
from ensemble.strategies.reduction import reduced, served

LOGITS = torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[0.0, torch.tensor(3.0).log()], [0.0, 0.0]]])


def test_the_mean_is_of_probabilities_over_the_models() -> None:
    # image 0: (1/2, 1/2) and (1/4, 3/4); image 1: (1/2, 1/2) twice
    assert reduced(LOGITS, "mean").tolist() == [
        pytest.approx([0.375, 0.625]),
        pytest.approx([0.5, 0.5]),
    ]
    assert reduced(LOGITS, "none") is LOGITS
    assert served(lambda x: x, "mean")(LOGITS).tolist() == reduced(LOGITS, "mean").tolist()


def test_sixteen_bits_are_summed_in_float32_and_an_unknown_reduction_is_refused() -> None:
    assert reduced(LOGITS.bfloat16(), "mean").dtype == torch.float32
    with pytest.raises(ValueError, match="expected a reduction out of none, mean, found 'max'"):
        reduced(LOGITS, "max")


def test_a_mean_is_compared_with_the_means_of_the_reference() -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    right = reduced(logits, "mean")
    assert check_served(right, logits, reduce="mean", tolerance=1e-4).problem is None
    of_two = reduced(logits[:2], "mean")
    found = check_served(of_two, logits, reduce="mean", tolerance=1e-4).problem
    assert found is not None
    assert found.startswith("outputs disagree: the mean over the models is off by")
