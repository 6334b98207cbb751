"""The two baselines: a Python loop over the models, and vmap over their stacked weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.models.meta import MetaWithoutDynamo
from ensemble.strategies import saved_run
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.build_result import BuildResult, PerModel, serialized
from ensemble.strategies.contexts import ieee_products
from ensemble.strategies.serving import (
    Commit,
    Serving,
    Undo,
    exchange_entry,
    tensors_of,
    write_in_place,
)
from ensemble.strategies.stacked_outputs import stack_outputs
from ensemble.strategies.vmapped import VmappedForward

try:
    import functorch
except ImportError:  # removed in a future torch
    functorch = None


def loop(
    models: Sequence[Callable[[Tensor], object]],
    example: Tensor,
    *,
    private: Callable[[Tensor], Tensor] = torch.clone,
) -> BuildResult:
    """One forward per model, sequentially. Deliberately naive: this is the reference.

    private: copies x, in the memory format that the models receive.
    """
    called: list[Any] = list(models)
    serving = Serving(
        weights=lambda: tensors_of(called),
        stage=lambda index, model, _: exchange_entry(called, index, model),
        is_same_architecture=False,
        saved=lambda _, __, x: saved_run.of_modules(called, x, saved_run.EACH),
    )
    return BuildResult(_Loop(called, private), serving=serving)


class _Loop:
    """Call each model with its own batch, or all models with the same batch, copy-on-write.

    A model may modify its input in place, possibly through numpy. On the CPU each model gets a
    copy, which takes less than 0.2 % of a ResNet. On an accelerator a copy is a kernel launch, so
    one copy is shared until torch's version counter shows that a model has written to it.
    """

    def __init__(
        self, models: Sequence[Callable[[Tensor], object]], private: Callable[[Tensor], Tensor]
    ) -> None:
        self._models, self._private = models, private

    def __call__(self, x: Tensor) -> PerModel:
        if x.dim() == 5:
            batches = zip(self._models, self._private(x), strict=True)
            return PerModel([model(batch) for model, batch in batches])
        if x.device.type == "cpu":
            return PerModel([model(self._private(x)) for model in self._models])
        outputs, shared, version = list[object](), None, 0
        for model in self._models:
            if shared is None or shared._version != version:
                with torch.inference_mode(False), torch.no_grad():  # to have a version counter
                    shared = self._private(x)
                version = shared._version
            outputs.append(model(shared))
        return PerModel(outputs)


@torch.inference_mode()
def logits_in(models: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The loop's logits `(N, B, classes)` of x in another dtype; models are cast one at a time.

    Models in mixed precision run as they are if `dtype` is that of their first weight. Products are
    IEEE's: strategies are compared with these logits.
    """
    inputs = x if x.dim() == 5 else [x] * len(models)
    of_images = dtype if x.is_floating_point() else x.dtype
    with ieee_products(x.device):
        outputs = [
            _cast(model, x, dtype)(batch.to(of_images, copy=True))
            for model, batch in zip(models, inputs, strict=True)
        ]
    return stack_outputs(PerModel(outputs), len(models))


def _cast(model: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module:
    if weight_dtype([model], x) != dtype and stacking.named_tensors(model):
        return stacking.cast([model], dtype)[0]
    try:
        return stacking.private_copy(model)  # a call may mutate the model
    except UnavailableError:
        return model


def vmap(
    models: Sequence[nn.Module],
    example: Tensor,
    chunk_size: int | None = None,
    *,
    private: Callable[[Tensor], Tensor] = torch.clone,
    is_own_stack: bool = False,
) -> BuildResult:
    """`torch.vmap` of the stateless model over the stacked parameters and buffers.

    chunk_size: models per vmapped call; default: all. is_own_stack: the models are private copies,
    so their stack may be written to.
    """
    state = StackedState(models, is_own=is_own_stack)
    stateless, parameters, buffers = stateless_model(models)
    mapped = VmappedForward(
        stateless, len(models), private=private, chunk_size=chunk_size or len(models)
    )
    # Serialized: the stateless module is called with the state swapped in.
    return BuildResult(
        serialized(lambda x: mapped(state.of(parameters), state.of(buffers), x)),
        deferred_note=mapped.note,
        serving=Serving(
            weights=state.tensors.values,
            stage=lambda index, model, _: state.exchange(index, model),
            saved=lambda _, __, x: saved_run.of_vmapped(
                stateless, state.of(parameters), state.of(buffers), private(x)
            ),
        ),
    )


class StackedState:
    """The stacked tensors of N models by name. As long as no model is exchanged they may be the
    stack that the models' own tensors are slices of."""

    def __init__(self, models: Sequence[nn.Module], *, is_own: bool) -> None:
        self.tensors = stacking.stacked_state(models)
        of_models = {_storage(tensor) for tensor in stacking.named_tensors(models[0]).values()}
        is_view = any(_storage(tensor) in of_models for tensor in self.tensors.values())
        self._is_shared = is_view and not is_own

    def of(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in names)

    def exchange(self, index: int, model: nn.Module) -> Commit:
        """Exchange one model's slices; those of the models themselves are never written to."""
        new = stacking.named_tensors(model)

        def commit() -> Undo:
            if self._is_shared:
                for name, tensor in self.tensors.items():
                    self.tensors[name] = tensor.clone()
                self._is_shared = False
            pairs = [(tensor[index], new[name]) for name, tensor in self.tensors.items()]
            return write_in_place(pairs)()

        return commit


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


def stateless_model(
    models: Sequence[nn.Module],
) -> tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]:
    """functorch's stateless function `f(parameters, buffers, x)`, and its parameter and buffer
    names.

    `combine_state_for_ensemble` copies the tensors that it stacks, so it is called with skeletons
    on the meta device, for the function only; `stacked_state` provides the state. The fallback,
    where a future torch has removed it or cannot deepcopy the models (they hold a lock), is
    `torch.func.functional_call`.
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
    """functorch's stateless module, or None if it is unavailable or fails."""
    if not functorch or not hasattr(functorch, "combine_state_for_ensemble"):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*combine_state_for_ensemble", category=FutureWarning
        )
        try:
            with MetaWithoutDynamo():
                stateless, _, _ = functorch.combine_state_for_ensemble(skeletons)
        except Exception:
            return None
    return stateless
