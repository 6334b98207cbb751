"""Why something failed, in one line; if out of memory, with how many models would fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from ensemble import formatting
from ensemble.bench.build import build, release_compiled
from ensemble.errors import drop_frames, first_line
from ensemble.machine.dtypes import NumericFormat
from ensemble.machine.memory import is_out_of_memory, may_be_out_of_memory

T = TypeVar("T")

log = logging.getLogger(__name__)


def explain(
    error: Exception,
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    numbers: NumericFormat,
) -> str:
    """Why a strategy failed; if out of memory, with how many models would fit.

    An error that may have another cause counts as out of memory if fewer models fit.
    """
    reason, is_certain = f"{type(error).__name__}: {first_line(error)}", is_out_of_memory(error)
    if not is_certain and not may_be_out_of_memory(error):
        return reason
    drop_frames(error)  # they hold the memory
    fits = _fitting(name, models, example, numbers)
    if not fits and not is_certain:
        return reason
    advice = f"{fits} would fit" if fits else "not even 1 would fit"
    asked = formatting.count(len(models), "model")
    return f"out of memory with {asked}; {advice} (tried by halving)"


def optional(figure: str, function: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """The result of `function`, or None and a note of one line where it fails: an additional figure
    must not cost the times."""
    try:
        return function(), ()
    except Exception as error:
        log.debug("no %s", figure, exc_info=True)
        failed = f"{type(error).__name__}: {first_line(error)}"
        why = "out of memory" if is_out_of_memory(error) else failed
    release_compiled()  # outside of the handler: there the error keeps frames and memory alive
    return None, (f"no {figure}: {why}",)


def _fitting(
    name: str, models: Sequence[nn.Module], example: Tensor, numbers: NumericFormat
) -> int:
    count = len(models) // 2
    while count:
        try:
            release_compiled()
            build(name, models[:count], example[:count] if example.dim() == 5 else example, numbers)
            return count
        except Exception:
            count //= 2
    return 0
