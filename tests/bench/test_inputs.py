"""Inputs that never repeat."""

from itertools import pairwise

import torch

from ensemble.bench.inputs import DARKEST, vary


def variants(example: torch.Tensor, count: int) -> list[torch.Tensor]:
    found = [torch.full_like(example, torch.nan) for _ in range(count)]
    for number, out in enumerate(found):
        vary(example, number, out=out)
    return found


def test_the_first_variant_is_the_example() -> None:
    example = torch.randn(2, 3, 5, 7)
    assert torch.equal(variants(example, 1)[0], example)


def test_a_variant_is_the_example_shifted_around_its_edges_and_darker() -> None:
    example = torch.randn(2, 4, 3, 30, 70)
    found = variants(example, 4)[3]
    brightness = 1 - (1 - DARKEST) * (3 * 0.6180339887498949 % 1)
    expected = torch.roll(example, (3 * 89, 3 * 55), (-2, -1)) * brightness
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_two_variants_are_equal_however_small_the_image() -> None:
    example = torch.rand(1, 3, 1, 1) + 1
    found = {float(variant[0, 0, 0, 0]) for variant in variants(example, 1000)}
    assert len(found) == 1000


def test_successive_variants_differ_much() -> None:
    example = torch.rand(1, 3, 224, 224)
    found = variants(example, 50)
    differences = [float((one - other).abs().mean()) for one, other in pairwise(found)]
    assert min(differences) > 0.15
