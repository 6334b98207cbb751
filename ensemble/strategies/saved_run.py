"""A run as a graph of operators: what a file holds of a forward for inputs of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.runtime.instructions import Instructions, instructions_of
from ensemble.models import stacking

ALL, EACH, CONCURRENT = "all", "each", "concurrent"


@dataclass(frozen=True)
class SavedRun:
    """A run as a graph.

    Attributes:
        mode: ALL: `graph(*constants[0], x)` gives the stacked outputs of all models. EACH:
            `graph(*constants[n], x)` those of model n. CONCURRENT: as EACH, one model per core.
        is_channels_last: the memory format of x.
        constants: tensors, packed weights and numbers.
    """

    mode: str
    is_channels_last: bool
    graph: Instructions
    constants: Sequence[Sequence[Any]]


def of_modules(models: Sequence[nn.Module], x: Tensor, mode: str) -> SavedRun:
    """Models of one architecture, as a graph that each runs with its tensors.

    x: as the models receive it: `(B, C, H, W)`, or `(N, B, C, H, W)`.

    Raises:
        ValueError: models of several architectures.
        UnavailableError: torch cannot trace them.
    """
    from ensemble.compiler.graph.capture import capture  # which imports torch.compile

    stacking.check_same_architecture(models)
    module, names = capture(models[0], x[0] if x.dim() == 5 else x)
    constants = [
        [tensors[name] for name in names] for tensors in map(stacking.named_tensors, models)
    ]
    return SavedRun(mode, _is_channels_last(x), instructions_of(module), constants)


def of_vmapped(
    stateless: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    x: Tensor,
) -> SavedRun:
    """`torch.vmap` of a stateless model `(parameters, buffers, x)` over stacked tensors.

    Raises:
        UnavailableError: torch cannot trace it.
    """
    from ensemble.compiler.graph.functionalize import trace_functional

    def flat(*tensors: Tensor) -> Tensor:
        *state, images = tensors
        return stateless(tuple(state[: len(parameters)]), tuple(state[len(parameters) :]), images)

    state = (*parameters, *buffers)
    in_dims = (*[0] * len(state), 0 if x.dim() == 5 else None)
    module = trace_functional(torch.vmap(flat, in_dims=in_dims), (*state, x), is_vmapped=True)
    return SavedRun(ALL, _is_channels_last(x), instructions_of(module), [list(state)])


def _is_channels_last(x: Tensor) -> bool:
    images = x[0] if x.dim() == 5 else x
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
