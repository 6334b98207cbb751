"""The result of a builder: a forward, notes on how it was built, and the autotuner's choice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ensemble.machine.per_process import PerProcess
from ensemble.strategies.serving import Serving

ForwardFn = Callable[[Tensor], Tensor]  # x like the example -> logits (N, B, classes)


@dataclass(frozen=True)
class PerModel:
    """The outputs of N models that were called separately, in order; not stacked yet."""

    outputs: Sequence[object]


RawForward = Callable[[Tensor], Any]  # x like the example -> logits (N, B, classes), or `PerModel`


def no_note() -> str:
    """An empty note."""
    return ""


@dataclass(frozen=True)
class Choice:
    """The strategy that an autotuner chose, a one-line description of all candidates, and the
    seconds that tuning took in addition to building the chosen one; the seconds per call of each
    candidate, and the errors of others."""

    name: str
    tried: str
    seconds: float
    times_s: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildResult:
    """A forward for N models, and a note on how it was built (may be empty), with details that may
    differ between processes.

    `forward` returns logits `(N, B, classes)` or the outputs of each model, which may alias memory
    that it reuses: `strategies.build_unverified` wraps it in `strategies.forward.Forward`, which
    checks the input and copies the output. `deferred_note` returns a further note, known after the
    first call. `serving` is what can be done with the weights later; None: other shapes and models
    need another build. `kernels` counts the steps of each kind.
    """

    forward: RawForward
    note: str = ""
    details: str = ""
    choice: Choice | None = None
    deferred_note: Callable[[], str] = no_note
    serving: Serving | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)


Builder = Callable[[Sequence[nn.Module], Tensor], BuildResult]


def serialized(run: RawForward) -> RawForward:
    """`run` under a lock, for forwards that are not reentrant."""
    lock = PerProcess(threading.Lock)

    def call(x: Tensor) -> Any:
        with lock():
            return run(x)

    return call
