"""What a strategy gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Built:
    """`forward(x)` -> logits `(N, B, classes)`, and a note on how it was built, empty for none."""

    forward: Forward
    note: str = ""


Builder = Callable[[Sequence[nn.Module], Tensor], Built]
