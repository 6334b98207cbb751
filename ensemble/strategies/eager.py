"""The two baselines: a Python loop over the models, and vmap over their stacked state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.models.meta import ByShape
from ensemble.strategies.build_result import Built, PerModel, taking_turns
from ensemble.strategies.forward import owned
from ensemble.strategies.vmapped import Mapped

try:
    import functorch
except ImportError:  # a torch that has dropped it
    functorch = None


def loop(
    models: Sequence[Callable[[Tensor], object]],
    example: Tensor,
    *,
    private: Callable[[Tensor], Tensor] = torch.clone,
) -> Built:
    """One forward a model, one after another. Naive on purpose: this is the reference.

    private: copies x, in the memory format that the models are to see.
    """
    if example.dim() == 5:
        return Built(
            lambda x: PerModel([model(one) for model, one in zip(models, private(x), strict=True)])
        )
    return Built(SharedInput(models, private))


class SharedInput:
    """Calls models with one image, each with the caller's values.

    A model may normalize its input in place, or through numpy. On the CPU each gets a copy, which
    takes less than 0.2 % of a ResNet; where a copy is a kernel to launch, one serves all models as
    long as torch's version counter says that none has written to it.
    """

    def __init__(
        self, models: Sequence[Callable[[Tensor], object]], private: Callable[[Tensor], Tensor]
    ) -> None:
        self._models, self._private = models, private

    def __call__(self, x: Tensor) -> PerModel:
        if x.device.type == "cpu":
            return PerModel([model(self._private(x)) for model in self._models])
        outputs, shared, version = list[object](), None, 0
        for model in self._models:
            if shared is None or shared._version != version:
                with torch.inference_mode(False), torch.no_grad():  # else it has no version
                    shared = self._private(x)
                version = shared._version
            outputs.append(model(shared))
        return PerModel(outputs)


@torch.inference_mode()
def logits_in(models: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The loop's logits of x in another dtype; no more than one model exists in it at a time."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    of_images = dtype if x.is_floating_point() else x.dtype
    outputs = [
        _cast(model, dtype)(batch.to(of_images, copy=True))
        for model, batch in zip(models, inputs, strict=True)
    ]
    return owned(PerModel(outputs), len(models))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    tensors = stacking.named_tensors(model).values()
    known = all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point())
    if not known:
        return stacking.cast([model], dtype)[0]
    try:
        return stacking.private_copy(model)  # a call may change what a model holds
    except UnavailableError:
        return model


def vmap(
    models: Sequence[nn.Module],
    example: Tensor,
    chunk_size: int | None = None,
    *,
    private: Callable[[Tensor], Tensor] = torch.clone,
) -> Built:
    """One forward of the stateless model, mapped over the stacked parameters and buffers, of all
    models at once or of so many."""
    state = stacking.stacked_state(models)
    stateless, parameter_names, buffer_names = stateless_model(models)
    parameters = tuple(state[name] for name in parameter_names)
    buffers = tuple(state[name] for name in buffer_names)
    mapped = Mapped(
        stateless,
        len(models),
        per_model=example.dim() == 5,
        private=private,
        chunk_size=chunk_size or len(models),
    )
    # functorch swaps the state of one module in and out
    return Built(taking_turns(lambda x: mapped(parameters, buffers, x)), later=mapped.note)


def stateless_model(
    models: Sequence[nn.Module],
) -> tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]:
    """functorch's stateless form `f(parameters, buffers, x)`, and the names that it goes by.

    `combine_state_for_ensemble` copies what it stacks, so it gets skeletons on the meta device: it
    gives the function for no memory, and `stacked_state` gives the state.
    Where a future torch has dropped it, or the models hold what it cannot copy (a lock),
    `torch.func.functional_call` gives the same.
    """
    skeletons = [stacking.skeleton(model) for model in models]
    stateless = _by_functorch(skeletons)
    if stateless is not None:
        return stateless, tuple(stateless.param_names), tuple(stateless.buffer_names)
    names = tuple(name for name, _ in models[0].named_parameters())
    buffer_names = tuple(name for name, _ in models[0].named_buffers())
    by_name = stacking.stateless(skeletons[0])

    def call(parameters: tuple[Tensor, ...], buffers: tuple[Tensor, ...], x: Tensor) -> Tensor:
        tensors = (*parameters, *buffers)
        return by_name(dict(zip((*names, *buffer_names), tensors, strict=True)), x)

    return call, names, buffer_names


def _by_functorch(skeletons: Sequence[nn.Module]) -> Any:
    """functorch's stateless module, or None where it cannot be had."""
    if not functorch or not hasattr(functorch, "combine_state_for_ensemble"):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*combine_state_for_ensemble", category=FutureWarning
        )
        try:
            with ByShape():
                stateless, _, _ = functorch.combine_state_for_ensemble(skeletons)
        except Exception:
            return None
    return stateless
