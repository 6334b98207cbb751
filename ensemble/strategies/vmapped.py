"""`torch.vmap` of a stateless model over N models, with what it cannot do said in words."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.functionalize import looped_note, no_fallback_warnings, why_not_mapped
from ensemble.errors import UnavailableError
from ensemble.machine import captured_warnings
from ensemble.machine.memory import is_out_of_memory
from ensemble.strategies.build_result import PerModel
from ensemble.strategies.forward import check_dense

State = tuple[Tensor, ...]

_NO_RULE = re.compile(r"batching rule for (\S+?)\.( |$)")


class Mapped:
    """`(parameters, buffers, x)`, stacked -> what the N models give, stacked.

    Args:
        stateless: `(parameters, buffers, x)` of one model.
        num_models: N.
        per_model: x is `(N, B, C, H, W)`, not one batch for all.
        private: copies x, which models may write to.
        chunk_size: how many models at a time.
    """

    def __init__(
        self,
        stateless: Callable[[State, State, Tensor], object],
        num_models: int,
        *,
        per_model: bool,
        private: Callable[[Tensor], Tensor],
        chunk_size: int,
    ) -> None:
        self._stateless, self._num_models, self._per_model = stateless, num_models, per_model
        self._private = private
        self._chunks = [
            slice(first, first + chunk_size) for first in range(0, num_models, chunk_size)
        ]
        in_dims = (0, 0, 0 if per_model else None)
        self._mapped = torch.vmap(stateless, in_dims=in_dims, randomness="different")
        self._looped: tuple[str, ...] | None = None  # None: not called yet

    def note(self) -> str:
        """What vmap has no batching rule for, as the first call has shown."""
        return looped_note(self._looped or ())

    def __call__(self, parameters: State, buffers: State, x: Tensor) -> Any:
        if not parameters and not buffers and not self._per_model:
            return self._one_by_one(parameters, buffers, x)  # there is nothing to map over
        try:
            if self._looped is None:
                return self._call_first(parameters, buffers, x)
            with no_fallback_warnings() if self._looped else contextlib.nullcontext():
                return self._call(parameters, buffers, x)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if isinstance(error.__context__, KeyboardInterrupt):  # functorch's, on its way out
                raise error.__context__ from None
            for output in self._one_by_one(parameters, buffers, x).outputs:  # which may raise
                check_dense(output)
            raise UnavailableError(why_not_mapped(error)) from error

    def _call(self, parameters: State, buffers: State, x: Tensor) -> Any:
        parts: list[Any] = []
        for chunk in self._chunks:
            own, held = (tuple(t[chunk] for t in part) for part in (parameters, buffers))
            images = x[chunk] if self._per_model else x
            parts.append(self._mapped(own, held, self._private(images)))
        if len(parts) == 1 or not all(isinstance(part, Tensor) for part in parts):
            return parts[0]
        return torch.cat(parts)

    def _call_first(self, parameters: State, buffers: State, x: Tensor) -> Any:
        with captured_warnings.caught("always") as caught:
            result = self._call(parameters, buffers, x)
        looped = dict[str, None]()
        for warning in caught:
            if found := _NO_RULE.search(str(warning.message)):
                looped[found[1]] = None
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        self._looped = tuple(looped)
        return result

    def _one_by_one(self, parameters: State, buffers: State, x: Tensor) -> PerModel:
        outputs = []
        for index in range(self._num_models):
            own = tuple(nn.Parameter(t[index], requires_grad=False) for t in parameters)
            held = tuple(tensor[index] for tensor in buffers)
            images = x[index] if self._per_model else x
            outputs.append(self._stateless(own, held, images.clone()))
        return PerModel(outputs)
