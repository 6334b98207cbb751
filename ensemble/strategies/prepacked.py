"""Folded models with packed and fused convolutions: what compiling gives, without compiling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from ensemble.passes.folding import channels_last, folded
from ensemble.passes.packing import pack
from ensemble.strategies import eager
from ensemble.strategies.built import Built
from ensemble.strategies.concurrent import side_by_side


def loop(models: Sequence[nn.Module], example: Tensor) -> Built:
    """One prepacked forward a model, one after another, each on all cores."""
    built = eager.loop(_packed(models, example), example)
    return Built(lambda x: built.forward(channels_last(x)))


def concurrent(models: Sequence[nn.Module], example: Tensor) -> Built:
    """One prepacked forward a model, one model a core."""
    return side_by_side(_packed(models, example), example)


def _packed(models: Sequence[nn.Module], example: Tensor) -> list[fx.GraphModule]:
    one = channels_last(example)
    one = one[0] if one.dim() == 5 else one
    # Folded one at a time: only one model then exists folded and unpacked.
    return [pack(folded([model])[0], one) for model in models]
