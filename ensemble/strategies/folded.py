"""Loop and vmap with batch norm folded into the convolutions and channels-last activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble.passes.folding import channels_last, folded
from ensemble.strategies import eager
from ensemble.strategies.built import Built


def loop(models: Sequence[nn.Module], example: Tensor) -> Built:
    """`eager.loop` over folded models."""
    built = eager.loop(folded(models), example)
    return Built(lambda x: built.forward(channels_last(x)))


def vmap(models: Sequence[nn.Module], example: Tensor) -> Built:
    """`eager.vmap` over folded models: grouped convolutions like channels-last best."""
    built = eager.vmap(folded(models), example)
    return Built(lambda x: built.forward(channels_last(x)))
