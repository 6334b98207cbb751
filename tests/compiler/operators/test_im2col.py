"""Convolutions as batched matrix products against torch's own convolution."""

import pytest
import torch
from torch.nn import functional

from ensemble.compiler.operators import im2col


@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (3, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 3)])
def test_the_product_is_the_convolution_of_each_model(
    per_model: bool, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn((3, 2, 5, 11, 9) if per_model else (2, 5, 11, 9))
    weight = torch.randn(3, 6, 5, *kernel)
    found = im2col.conv2d(x, weight, stride, padding)
    images = x if per_model else x.expand(3, *x.shape)
    expected = torch.stack(
        [
            functional.conv2d(image, filters, stride=stride, padding=padding)
            for image, filters in zip(images, weight, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.stride(2) == 1  # channels last
