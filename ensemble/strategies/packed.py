"""Folded models with packed and fused convolutions: what compiling gives, without compiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemble.folding import channels_last, folded
from ensemble.packing import pack
from ensemble.strategies.concurrent import side_by_side

if TYPE_CHECKING:
    from torch import fx

    from ensemble.strategies import Forward


def loop(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """One packed forward a model, one after another, each on all cores."""
    ready = _packed(models, example)
    if example.dim() == 5:
        return lambda x: torch.stack(
            [model(own) for model, own in zip(ready, channels_last(x), strict=True)]
        )

    def forward(x: Tensor) -> Tensor:
        x = channels_last(x)
        return torch.stack([model(x) for model in ready])

    return forward


def concurrent(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """One packed forward a model, one model a core."""
    ready = _packed(models, example)
    return side_by_side(lambda index, x: ready[index](x), len(ready), example)


def _packed(models: Sequence[nn.Module], example: Tensor) -> list[fx.GraphModule]:
    one = channels_last(example)
    one = one[0] if one.dim() == 5 else one
    # Folded one at a time: only one model then exists folded and unpacked.
    return [pack(folded([model])[0], one) for model in models]
