"""Validation of the arguments of `build`, before anything is built."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensemble.errors import InputError, UnavailableError, first_line
from ensemble.machine.memory import is_out_of_memory
from ensemble.models import stacking
from ensemble.strategies.plain_tensors import (
    check_no_parametrization_cache,
    is_traced,
    to_plain_tensor,
)
from ensemble.strategies.stacked_outputs import check_dense


def validated(models: Any, example: Any) -> tuple[tuple[nn.Module, ...], Tensor]:
    """The models as a tuple, and a copy of the example that models cannot modify for the caller.

    Raises:
        ValueError, UnavailableError: see `strategies.build`; a ValueError names the argument.
    """
    check_no_parametrization_cache()
    every = _models(models)
    if not isinstance(example, Tensor):
        raise ValueError(f"example: expected a tensor, got {type(example).__name__}")
    if type(example) is Tensor or type(example) is not type(_first_tensor(every)):
        example = to_plain_tensor(example, argument="example")
    if is_traced(is_plain=type(example) is Tensor):
        raise UnavailableError(
            "ensemble.build cannot be called under a dispatch mode that traces operators or fakes"
            " tensors"
        )
    _check_shape(example, len(every))
    for index, model in enumerate(every):
        _check_model(model, index, example)
    return every, example.detach().clone()


def check_max_batch(max_batch: object, example: Tensor) -> None:
    """Raise ValueError unless it is None, or a number of at least the example's images a model."""
    least = example.shape[-4]
    if max_batch is not None and not (type(max_batch) is int and max_batch >= least):
        raise ValueError(f"max_batch: expected at least the example's {least}, got {max_batch!r}")


def _models(models: Any) -> tuple[nn.Module, ...]:
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise ValueError(f"models: expected a list of modules, got one {type(models).__name__}")
    if isinstance(models, str | bytes | os.PathLike) or not isinstance(models, Iterable):
        models = [models]  # rejected below by its type
    every = tuple(models)
    if not every:
        raise ValueError("models: expected at least one model, got none")
    for index, model in enumerate(every):
        if isinstance(model, str | bytes | os.PathLike):
            raise ValueError(
                f"models: expected modules, got {model!r}; use ensemble.load_models to read files"
            )
        if not isinstance(model, nn.Module):
            found = type(model).__name__
            raise ValueError(f"models: expected modules, got {found} as model {index}")
    return every


def _first_tensor(models: Sequence[nn.Module]) -> Tensor | None:
    return next((tensor for model in models for tensor in _tensors(model)), None)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _check_shape(example: Tensor, num_models: int) -> None:
    found = tuple(example.shape)
    if example.dim() != 4 and not (example.dim() == 5 and len(example) == num_models):
        shapes = f"(B, channels, H, W) or ({num_models}, B, channels, H, W)"
        raise ValueError(f"example: expected shape {shapes}, got {found}")
    if not example.numel():
        raise ValueError(f"example: expected at least one image, got shape {found}")


def _check_model(model: nn.Module, index: int, example: Tensor) -> None:
    for module in model.modules():
        if type(module).__module__.startswith("torch._dynamo"):
            raise ValueError(
                f"models: expected uncompiled modules, but model {index} was returned by"
                " torch.compile; pass the original module (its _orig_mod)"
            )
    tensors = _tensors(model)
    if any(map(is_lazy, tensors)):
        raise ValueError(
            f"models: expected initialized parameters, but model {index} has lazy ones; call it"
            " once first"
        )
    weight = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if weight is not None and (weight.device, weight.dtype) != (example.device, example.dtype):
        expected = f"{weight.dtype} on {weight.device}, like model {index}"
        raise ValueError(f"example: expected {expected}, got {example.dtype} on {example.device}")
    if stacking.is_in_train_mode(model):
        raise ValueError(
            f"models: expected eval mode, but model {index} is in train mode; call model.eval()"
        )
    _check_signature(model, index)


def _check_signature(model: nn.Module, index: int) -> None:
    """Raise ValueError unless the model can be called with one tensor."""
    if getattr(type(model), "forward", None) is nn.Module.forward and "forward" not in vars(model):
        raise ValueError(f"models: expected modules with a forward, but model {index} has none")
    if type(model).__call__ is not nn.Module.__call__ or isinstance(model, torch.jit.ScriptModule):
        return
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # not implemented in Python
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"models: expected a forward that takes one tensor, got forward{signature} in model"
            f" {index}: {error}"
        ) from error


def check_runs(model: nn.Module, example: Tensor) -> None:
    """Check that a model runs the example.

    Raises:
        ValueError: it does not; the message contains the model's error. An InputError if it has no
            such output: see `outputs.SelectedOutput`.
        Exception: out of memory.
    """
    try:
        copy = stacking.private_copy(model)
    except UnavailableError:
        return
    try:
        output = copy((example[0] if example.dim() == 5 else example).clone())
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"example: model 0 fails with it: {reason}") from error
    check_dense(output)


def weight_dtype(models: Sequence[nn.Module], example: Tensor) -> torch.dtype:
    """The dtype of the models' floating-point tensors; without any, the example's dtype, or float32
    for an integer example."""
    for model in models:
        for tensor in stacking.named_tensors(model).values():
            if tensor.is_floating_point():
                return tensor.dtype
    return example.dtype if example.is_floating_point() else torch.float32
