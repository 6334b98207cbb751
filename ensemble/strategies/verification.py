"""Verification of built strategies: their output must agree with the models' own.

A strategy that runs one model's code, or a trace of it, for all models is wrong if that code refers
to a particular model (a closure over `self`, a patched forward, a frozen script) or is stateful.
Only a comparison detects that.
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
from ensemble.strategies.contexts import execution_context
from ensemble.strategies.forward import Forward


class Behavior(Enum):
    """What the outputs of a model depend on, in addition to x."""

    PURE = auto()  # nothing
    RANDOM = auto()  # torch's generators; draws from Python's and NumPy's count as state
    STATEFUL = auto()  # earlier calls
    USES_AUTOGRAD = auto()  # gradients computed within the forward
    UNKNOWN = auto()  # it cannot be copied, it fails, or the example is a fake tensor


def behavior(model: nn.Module, example: Tensor) -> Behavior:
    """Classify a model by calling copies of it with the example and a modified example."""
    x = agreement.informative(example)
    x = x[0] if x.dim() == 5 else x
    if type(x) is not Tensor:
        return Behavior.UNKNOWN
    other = x.flip(-1) * 0.75 if x.is_floating_point() else x.flip(-1)
    try:
        with execution_context(x.device), captured_warnings.capture("ignore"):
            one, fresh = stacking.private_copy(model), stacking.private_copy(model)
            before = randomness.torch_states(x.device)
            first = one(x.clone())
            numbers, buffers = _numbers(one), _buffers(one)
            later, again = one(other.clone()), one(x.clone())
            drawn = randomness.torch_states(x.device) != before
            without_first = fresh(other.clone())
            with torch.inference_mode(False), torch.no_grad():
                graded = stacking.private_copy(model)(x.clone())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Behavior.UNKNOWN
    is_same = is_close(again, first) and is_close(without_first, later)
    if is_same and numbers == _numbers(one) and _are_equal(buffers, _buffers(one)):
        graded = graded.detach() if isinstance(graded, Tensor) else graded
        return Behavior.PURE if is_close(graded, first) or drawn else Behavior.USES_AUTOGRAD
    return Behavior.RANDOM if drawn else Behavior.STATEFUL


def _numbers(model: nn.Module) -> dict[str, object]:
    """The numeric attributes of all submodules: a call that changes one, such as a counter, makes
    the model stateful even if no output shows it yet."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float)
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers: running statistics may change by less than any output shows."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Are buffers equal, bit for bit? NaN equals NaN."""
    return one.keys() == other.keys() and all(
        agreement.same_bits(one[name], other[name]) for name in one
    )


def check(forward: Forward, models: Sequence[nn.Module], example: Tensor) -> None:
    """Compare the output of a forward with that of the models, for the example.

    Raises:
        UnavailableError: the outputs differ in dtype or value.
    """
    x = agreement.informative(example)
    found = forward(x)
    with execution_context(x.device):
        expected = eager.logits_in(models, x, weight_dtype(models, x))
    if found.dtype != expected.dtype:
        raise UnavailableError(
            f"{forward.strategy} returns {found.dtype}, but the models return {expected.dtype}: a"
            " 0-dim tensor does not take part in type promotion, its stack does"
        )
    rounded = x.is_floating_point() or found.is_floating_point()
    if not (all(map(is_close, found, expected)) if rounded else torch.equal(found, expected)):
        raise UnavailableError(
            f"{forward.strategy} disagrees with the models: their code may refer to one of them (a"
            " closure, a patched forward) or depend on the memory layout of tensors"
        )
