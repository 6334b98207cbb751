"""`Built`: what a strategy gives: its forward, a note, and what it chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Choice:
    """Which strategy was chosen at build out of several, what was tried in one line, and what
    choosing took beyond the build of the one chosen."""

    name: str
    note: str
    seconds: float


@dataclass(frozen=True)
class Built:
    """`forward(x)` -> logits `(N, B, classes)`, and a note on how it was built, empty for none."""

    forward: Forward
    note: str = ""
    choice: Choice | None = None


Builder = Callable[[Sequence[nn.Module], Tensor], Built]
