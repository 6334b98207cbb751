"""Loop and vmap with batch norm folded into the convolutions and channels-last activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ensemble.folding import channels_last, folded
from ensemble.strategies import eager

if TYPE_CHECKING:
    from ensemble.strategies import Forward


def loop(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """`eager.loop` over folded models."""
    forward = eager.loop(folded(models), example)
    return lambda x: forward(channels_last(x))


def vmap(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """`eager.vmap` over folded models: grouped convolutions like channels-last best."""
    forward = eager.vmap(folded(models), example)
    return lambda x: forward(channels_last(x))
