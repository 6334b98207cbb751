"""Ensembles of segmentation networks, whose outputs are `(N, B, classes, H, W)`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ensemble
from tests.unet import CLASSES, bilinear, trained, transposed, with_instance_norm

STRATEGIES = "loop", "vmap", "folded_vmap", "lowered_vmap", "prepacked_concurrent", "best"


@pytest.mark.parametrize("make", [transposed, bilinear, with_instance_norm])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("per_model", [False, True])
def test_five_unets_give_the_maps_of_each(
    make: Callable[[], nn.Module], name: str, per_model: bool
) -> None:
    torch.manual_seed(0)
    models = trained(make, 5)
    shape = (5, 2, 3, 20, 28) if per_model else (2, 3, 20, 28)
    x = torch.randn(shape)
    try:
        forward = ensemble.build(name, models, torch.zeros(shape))
    except ensemble.UnavailableError as error:
        pytest.skip(str(error))
    found = forward(x)
    with torch.no_grad():
        batches = x if per_model else x.expand(5, *x.shape)
        exact = torch.stack(
            [model.double()(batch.double()) for model, batch in zip(models, batches, strict=True)]
        )
    assert found.shape == (5, 2, CLASSES, 20, 28)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5
