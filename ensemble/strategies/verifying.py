"""What `build` makes sure of, beyond what a strategy knows: that it answers as the models do.

A strategy that runs one model's code for all, or a trace of it, is wrong for code that refers to
one model (a closure over `self`, a patched forward, a frozen script), or that remembers earlier
calls. Nothing but a comparison shows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.machine.memory import is_out_of_memory
from ensemble.models import stacking
from ensemble.passes.folding import is_close
from ensemble.strategies import agreement, eager
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.forward import Forward, settings


class Behavior(Enum):
    """What the outputs of a model depend on, beside x."""

    PLAIN = auto()
    RANDOM = auto()
    STATEFUL = auto()  # earlier calls
    UNKNOWN = auto()  # it cannot be copied, or does not run; fake tensors have no values


def behavior(model: nn.Module, example: Tensor) -> Behavior:
    """By three calls of copies of a model on the example."""
    x = agreement.informative(example)
    x = x[0] if x.dim() == 5 else x
    if type(x) is not Tensor:
        return Behavior.UNKNOWN
    try:
        with settings(x.device):
            one = stacking.private_copy(model)
            first, again = _seeded(one, x, seed=0), _seeded(one, x, seed=0)
            other = _seeded(stacking.private_copy(model), x, seed=1)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Behavior.UNKNOWN
    if not is_close(again, first):
        return Behavior.STATEFUL
    return Behavior.PLAIN if is_close(other, first) else Behavior.RANDOM


def _seeded(model: nn.Module, x: Tensor, *, seed: int) -> object:
    """An output, of random numbers that nobody else gets."""
    with torch.random.fork_rng(devices=[] if x.device.type == "cpu" else [x.device]):
        torch.manual_seed(seed)
        return model(x.clone())


def check(forward: Forward, models: Sequence[nn.Module], example: Tensor) -> None:
    """Does a forward answer as the models do, for the example?

    Raises:
        UnavailableError: it does not.
    """
    x = agreement.informative(example)
    found = forward(x)
    with settings(x.device):
        expected = eager.logits_in(models, x, weight_dtype(models, x))
    if not is_close(found, expected):
        raise UnavailableError(
            f"{forward.strategy} gives another result than the models: their code may refer to one"
            " of them (a closure, a patched forward), or depend on how tensors lie in memory"
        )
