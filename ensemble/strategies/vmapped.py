"""`torch.vmap` of a stateless model over N models, with errors for what vmap does not support."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batching_rules import looped_note, no_fallback_warnings, why_not_mapped
from ensemble.errors import UnavailableError
from ensemble.machine import captured_warnings
from ensemble.machine.memory import is_out_of_memory
from ensemble.strategies.build_result import PerModel
from ensemble.strategies.stacked_outputs import check_dense

State = tuple[Tensor, ...]
T = TypeVar("T")

_NO_RULE = re.compile(r"batching rule for (\S+?)\.( |$)")


class VmappedForward:
    """`(parameters, buffers, x)`, stacked -> the outputs of the N models, stacked.

    Args:
        stateless: `(parameters, buffers, x)` -> output of one model.
        num_models: N.
        private: copies x, which models may modify.
        chunk_size: models per vmapped call.

    Raises (on call):
        ValueError: the models do not return a single dense tensor.
        UnavailableError: vmap does not support an operation of the models.
    """

    def __init__(
        self,
        stateless: Callable[[State, State, Tensor], object],
        num_models: int,
        *,
        private: Callable[[Tensor], Tensor],
        chunk_size: int,
    ) -> None:
        self._stateless, self._num_models, self._private = stateless, num_models, private
        self._chunks = [
            slice(first, first + chunk_size) for first in range(0, num_models, chunk_size)
        ]
        # By the dimensions of x: a batch shared by all models, or one for each.
        self._mapped = {
            dims: torch.vmap(stateless, in_dims=(0, 0, in_dim), randomness="different")
            for dims, in_dim in ((4, None), (5, 0))
        }
        self._looped: tuple[str, ...] | None = None  # None: not called yet

    def note(self) -> str:
        """The operators without a batching rule, known after the first call; may be empty."""
        return looped_note(self._looped or ())

    def __call__(self, parameters: State, buffers: State, x: Tensor) -> Any:
        if not parameters and not buffers and x.dim() == 4:
            return self._call_each(parameters, buffers, x)  # there is no dimension to map over
        try:
            if self._looped is None:
                return self._call_first(parameters, buffers, x)
            with no_fallback_warnings() if self._looped else contextlib.nullcontext():
                return self._call(parameters, buffers, x)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if isinstance(error.__context__, KeyboardInterrupt):  # masked by functorch's cleanup
                raise error.__context__ from None
            for output in self._call_each(parameters, buffers, x).outputs:  # the model's own error
                check_dense(output)
            raise UnavailableError(why_not_mapped(error)) from error

    def _call(self, parameters: State, buffers: State, x: Tensor) -> Any:
        parts: list[Any] = []
        for chunk in self._chunks:
            some_parameters, some_buffers = (
                tuple(tensor[chunk] for tensor in tensors) for tensors in (parameters, buffers)
            )
            images = x[chunk] if x.dim() == 5 else x
            mapped = self._mapped[x.dim()]
            parts.append(mapped(some_parameters, some_buffers, self._private(images)))
        if len(parts) == 1 or not all(isinstance(part, Tensor) for part in parts):
            return parts[0]
        return torch.cat(parts)

    def _call_first(self, parameters: State, buffers: State, x: Tensor) -> Any:
        call = partial(self._call, parameters, buffers, x)
        result, self._looped = call_noting_fallbacks(call)
        return result

    def _call_each(self, parameters: State, buffers: State, x: Tensor) -> PerModel:
        outputs = []
        for index in range(self._num_models):
            own_parameters = tuple(nn.Parameter(t[index], requires_grad=False) for t in parameters)
            own_buffers = tuple(tensor[index] for tensor in buffers)
            images = x[index] if x.dim() == 5 else x
            outputs.append(self._stateless(own_parameters, own_buffers, images.clone()))
        return PerModel(outputs)


def call_noting_fallbacks(call: Callable[[], T]) -> tuple[T, tuple[str, ...]]:
    """The result of a vmapped call, and the operators without a batching rule.

    torch warns of them; other warnings are passed on.
    """
    with captured_warnings.capture("always") as caught:
        result = call()
    looped = dict[str, None]()
    for warning in caught:
        if found := _NO_RULE.search(str(warning.message)):
            looped[found[1]] = None
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return result, tuple(looped)
