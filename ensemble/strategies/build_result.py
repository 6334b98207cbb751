"""What a builder gives: how to run the models, notes on how it was built, and what it chose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ensemble.machine.per_process import PerProcess

Forward = Callable[[Tensor], Tensor]  # x like the example -> logits (N, B, classes)


@dataclass(frozen=True)
class PerModel:
    """The outputs of N models that were called one by one, in order: not stacked yet."""

    outputs: Sequence[object]


Run = Callable[[Tensor], Any]  # x like the example -> logits (N, B, classes), or `PerModel`


def no_note() -> str:
    """Nothing to add."""
    return ""


@dataclass(frozen=True)
class Choice:
    """Which strategy was chosen at build out of several, what was tried in one line, and what
    choosing took beyond the build of the one chosen."""

    name: str
    note: str
    seconds: float


@dataclass(frozen=True)
class Built:
    """How to run the models, a note on how it was built, empty for none.

    `forward` gives logits `(N, B, classes)` or the outputs of each model, and may hand out memory
    of its own: `strategies.make` wraps it in `strategies.forward.Forward`, which checks what comes
    in and copies what goes out. `later` is what the first call adds to the note.
    """

    forward: Run
    note: str = ""
    choice: Choice | None = None
    later: Callable[[], str] = no_note


Builder = Callable[[Sequence[nn.Module], Tensor], Built]


def taking_turns(run: Run) -> Run:
    """`run`, one call at a time: for what keeps state during a call."""
    lock = PerProcess(threading.Lock)

    def call(x: Tensor) -> Any:
        with lock():
            return run(x)

    return call
