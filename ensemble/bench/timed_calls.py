"""The timed calls of a built strategy: new inputs, every answer checked, memory watched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.inputs import vary
from ensemble.statistics import median

# A leak is reported if at least so many of the rounds grew, by so much in all and per call.
MIN_GROWING_SHARE, MIN_GROWTH_BYTES, MIN_LEAK_BYTES = 0.8, 4 * 2**20, 2**18
BUSY_CORES = 0.2  # of a core, while this program waits
KEPT_ANSWERS = 3  # that a result is compared with: there are two buffers for inputs


class TimedCalls:
    """The calls of a built strategy: each timed one has an input that no call before has had.

    Of `interleaved`: `renew` makes the next input, untimed calls have the one before it. It is made
    before those, since the threads of OpenMP that make it spin for some 5 ms.
    """

    def __init__(self, built: BuiltStrategy, example: Tensor) -> None:
        """example: in float32; the strategy is called in the dtype of its own."""
        self._built, self._example = built, example
        self._varied = torch.empty_like(example)
        self._input, self._next = _clone(built.example), _clone(built.example)
        self._number = self._next_number = 0
        self._answers = dict[int, Tensor]()  # number of an input -> result; the last few
        self.calls = 0
        self.result: Tensor | None = None

    def renew(self) -> None:
        """Make the next input, and forget the last result."""
        self._next_number += 1
        vary(self._example, self._next_number, out=self._varied)
        self._next.copy_(self._varied)
        self.result = None

    def repeat(self) -> None:
        """A call with the input of the last timed one."""
        self.calls += 1
        self._answers[self._number] = self._built.timed_forward(self._input)
        while len(self._answers) > KEPT_ANSWERS:
            del self._answers[min(self._answers)]

    def __call__(self) -> None:
        """A call with the next input."""
        self.calls += 1
        self._input, self._next = self._next, self._input
        self._number = self._next_number
        self.result = self._built.timed_forward(self._input)

    @property
    def repeats(self) -> bool:
        """Is the result that of an earlier input, to the last bit?"""
        result = self.result
        return result is not None and any(
            torch.equal(answer, result)
            for number, answer in self._answers.items()
            if number != self._number
        )


def _clone(x: Tensor) -> Tensor:
    """A copy of x, page-locked if x is."""
    return torch.empty_like(x, pin_memory=x.is_pinned()).copy_(x)


def leak(used_bytes: Sequence[int | None], calls: Sequence[int]) -> float | None:
    """The bytes by which memory grows with each call; None where it does not, or is not known.

    Args:
        used_bytes: after each round.
        calls: how many calls there were until then.
    """
    known = [(used, number) for used, number in zip(used_bytes, calls, strict=True) if used]
    steps = [
        (after - before) / (later - earlier)
        for (before, earlier), (after, later) in pairwise(known)
        if later > earlier
    ]
    slope = median(steps)
    if slope is None or slope < MIN_LEAK_BYTES or len(steps) < 3:
        return None
    growing = sum(step > 0 for step in steps) / len(steps)
    grown = known[-1][0] - known[0][0]
    return slope if growing >= MIN_GROWING_SHARE and grown >= MIN_GROWTH_BYTES else None


def remarks(leaked: float | None, busy_cores: float) -> list[str]:
    """What the calls leave behind, a sentence each."""
    lines = []
    if leaked is not None:
        lines.append(f"memory grows by {leaked / 1e6:.1f} MB per call")
    if busy_cores > BUSY_CORES:
        cores = f"{busy_cores:.1f}".removesuffix(".0")
        lines.append(f"keeps {cores} core{'s' * (cores != '1')} busy between calls")
    return lines
