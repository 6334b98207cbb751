"""Why something failed, in one line; for a lack of memory, with how much would fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ensemble import formatting
from ensemble.bench.build import start, tidy
from ensemble.errors import first_line
from ensemble.machine.memory import is_out_of_memory

T = TypeVar("T")

log = logging.getLogger(__name__)


def reason(
    error: Exception,
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    dtype: torch.dtype,
) -> str:
    """Why a strategy failed; for a lack of memory, with how many models would fit."""
    if not is_out_of_memory(error):
        return f"{type(error).__name__}: {first_line(error)}"
    error.__traceback__ = None  # it holds the frames that hold the memory
    fits = _fitting(name, models, example, dtype)
    advice = f"{fits} would fit" if fits else "not even 1 would fit"
    asked = formatting.count(len(models), "model")
    return f"out of memory with {asked}; {advice} (tried by halving)"


def optional(figure: str, function: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """What `function` gives; where it fails None and a note of one line, because a figure beside
    the times must not cost the times."""
    try:
        return function(), ()
    except Exception as error:
        log.debug("no %s", figure, exc_info=True)
        failed = f"{type(error).__name__}: {first_line(error)}"
        why = "out of memory" if is_out_of_memory(error) else failed
    tidy()  # out of the handler, in which the error holds the frames that hold the memory
    return None, (f"no {figure}: {why}",)


def _fitting(name: str, models: Sequence[nn.Module], example: Tensor, dtype: torch.dtype) -> int:
    count = len(models) // 2
    while count:
        tidy()
        try:
            start(name, models[:count], example[:count] if example.dim() == 5 else example, dtype)
            return count
        except Exception:
            count //= 2
    return 0
