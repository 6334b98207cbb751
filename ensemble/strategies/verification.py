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

from ensemble.compiler.graph.batch_norm_folding import is_close
from ensemble.errors import UnavailableError
from ensemble.machine import captured_warnings, randomness
from ensemble.machine.memory import is_out_of_memory
from ensemble.models import stacking
from ensemble.strategies import agreement, eager
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.forward import Forward, settings


class Behavior(Enum):
    """What the outputs of a model depend on, beside x."""

    PLAIN = auto()
    RANDOM = auto()  # torch's random numbers; those of Python and NumPy are earlier calls'
    STATEFUL = auto()  # earlier calls
    GRADED = auto()  # gradients that are computed within the forward
    UNKNOWN = auto()  # it cannot be copied, or does not run; fake tensors have no values


def behavior(model: nn.Module, example: Tensor) -> Behavior:
    """By calls of copies of a model, on the example and on another input like it."""
    x = agreement.informative(example)
    x = x[0] if x.dim() == 5 else x
    if type(x) is not Tensor:
        return Behavior.UNKNOWN
    other = x.flip(-1) * 0.75 if x.is_floating_point() else x.flip(-1)
    try:
        with settings(x.device), captured_warnings.caught("ignore"):
            one, fresh = stacking.private_copy(model), stacking.private_copy(model)
            before = randomness.of_torch(x.device)
            first = one(x.clone())
            numbers = _numbers(one)
            later, again = one(other.clone()), one(x.clone())
            drawn = randomness.of_torch(x.device) != before
            without_first = fresh(other.clone())
            with torch.inference_mode(False), torch.no_grad():
                graded = stacking.private_copy(model)(x.clone())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Behavior.UNKNOWN
    is_same = is_close(again, first) and is_close(without_first, later)
    if is_same and numbers == _numbers(one):
        graded = graded.detach() if isinstance(graded, Tensor) else graded
        return Behavior.PLAIN if is_close(graded, first) or drawn else Behavior.GRADED
    return Behavior.RANDOM if drawn else Behavior.STATEFUL


def _numbers(model: nn.Module) -> dict[str, object]:
    """The numbers that a model's modules hold as attributes: one that a call changes counts calls,
    and what it is good for may come later."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float)
    }


def check(forward: Forward, models: Sequence[nn.Module], example: Tensor) -> None:
    """Does a forward answer as the models do, for the example?

    Raises:
        UnavailableError: it does not.
    """
    x = agreement.informative(example)
    found = forward(x)
    with settings(x.device):
        expected = eager.logits_in(models, x, weight_dtype(models, x))
    if found.dtype != expected.dtype:
        raise UnavailableError(
            f"{forward.strategy} gives {found.dtype} where the models give {expected.dtype}: a"
            " tensor of no dimensions does not promote, one of several models does"
        )
    rounded = x.is_floating_point() or found.is_floating_point()
    if not (all(map(is_close, found, expected)) if rounded else torch.equal(found, expected)):
        raise UnavailableError(
            f"{forward.strategy} gives another result than the models: their code may refer to one"
            " of them (a closure, a patched forward), or depend on how tensors lie in memory"
        )
