"""The two baselines: a Python loop over the models, and vmap over their stacked state."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.models.meta import ByShape
from ensemble.strategies.built import Built

# torch's words, by the number of dimensions on both sides.
_WRITES_INTO_SHARED = re.compile("vmap: inplace|doesn't match the broadcast shape")

try:
    import functorch
except ImportError:  # a torch that has dropped it
    functorch = None


def loop(models: Sequence[Callable[[Tensor], Tensor]], example: Tensor) -> Built:
    """One forward a model, one after another. Naive on purpose: this is the reference."""
    if example.dim() == 5:
        return Built(lambda x: _stacked([model(one) for model, one in zip(models, x, strict=True)]))
    return Built(lambda x: _stacked([model(x) for model in models]))


def _stacked(outputs: list[Tensor]) -> Tensor:
    """What the models give, in one tensor; ValueError where one gives something else."""
    for output in outputs:
        if not isinstance(output, Tensor):
            raise ValueError(f"expected one tensor from each model, found {type(output).__name__}")
    return torch.stack(outputs)


@torch.inference_mode()
def logits_in(models: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The loop's logits of x in another dtype; no more than one model exists in it at a time."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    return _stacked(
        [_cast(model, dtype)(batch.to(dtype)) for model, batch in zip(models, inputs, strict=True)]
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    known = next(model.parameters()).dtype == dtype
    return model if known else stacking.cast([model], dtype)[0]


def vmap(models: Sequence[nn.Module], example: Tensor, chunk_size: int | None = None) -> Built:
    """One forward of the stateless model, mapped over the stacked parameters and buffers, of all
    models at once or of so many."""
    state = stacking.stacked_state(models)
    stateless, parameter_names, buffer_names = stateless_model(models)
    parameters = tuple(state[name] for name in parameter_names)
    buffers = tuple(state[name] for name in buffer_names)
    in_dims = (0, 0, 0 if example.dim() == 5 else None)
    mapped = over_models(torch.vmap(stateless, in_dims=in_dims, chunk_size=chunk_size))
    return Built(lambda x: mapped(parameters, buffers, x))


def over_models(mapped: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A vmapped forward that refuses in words what torch's vmap cannot do.

    A model may write into what it made of its input alone: `y = relu(x); y += norm(x)`. Where the
    models share x they share that y too, which has no room for what differs from model to model.
    """

    def call(*arguments: Any) -> Tensor:
        try:
            return mapped(*arguments)
        except (RuntimeError, ValueError) as error:
            if not _WRITES_INTO_SHARED.search(str(error)):
                raise
            message = (
                "vmap cannot write what differs by model into what the models share (in place)"
            )
            raise UnavailableError(message) from error

    return call


def stateless_model(
    models: Sequence[nn.Module],
) -> tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]:
    """functorch's stateless form `f(parameters, buffers, x)`, and the names that it goes by.

    `combine_state_for_ensemble` copies what it stacks, so it gets skeletons on the meta device: it
    gives the function for no memory, and `stacked_state` gives the state.
    Where a future torch has dropped it, `torch.func.functional_call` gives the same.
    """
    skeletons = [stacking.skeleton(model) for model in models]
    if functorch and hasattr(functorch, "combine_state_for_ensemble"):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*combine_state_for_ensemble", category=FutureWarning
            )
            with ByShape():
                stateless, _, _ = functorch.combine_state_for_ensemble(skeletons)
        return stateless, tuple(stateless.param_names), tuple(stateless.buffer_names)
    names = tuple(name for name, _ in models[0].named_parameters())
    buffer_names = tuple(name for name, _ in models[0].named_buffers())
    by_name = stacking.stateless(skeletons[0])

    def call(parameters: tuple[Tensor, ...], buffers: tuple[Tensor, ...], x: Tensor) -> Tensor:
        tensors = (*parameters, *buffers)
        return by_name(dict(zip((*names, *buffer_names), tensors, strict=True)), x)

    return call, names, buffer_names
