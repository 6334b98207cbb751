"""Strategies that end their process, for workers to be given: see `install`."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble import strategies
from ensemble.errors import UnavailableError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ensemble.strategies.build_result import BuildResult


REFUSED: list[bool] = []  # an entry for each call of `refused`


def kill(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    """As the kernel's out-of-memory killer does."""
    print("about to go", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def crash(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    """A segmentation fault."""
    import ctypes

    ctypes.string_at(0)
    raise AssertionError


def hang(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    time.sleep(10_000)
    raise AssertionError


def leave(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    os._exit(3)


def hoard(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    """Allocate until the process may hold no more, and be killed for it."""
    held = [bytearray(2**26) for _ in range(4)]
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    try:
        while True:
            held.append(bytearray(2**26))
    except MemoryError:
        if limit == resource.RLIM_INFINITY:
            raise
        os.kill(os.getpid(), signal.SIGKILL)  # where the kernel counts, it does this
    raise AssertionError


def broken(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    raise RuntimeError("CUDA error: unknown")


def refused(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    REFUSED.append(True)
    raise UnavailableError("not on this device")


def chatter(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    """Prints where messages go, as other people's packages do."""
    print("not a message")
    os.write(1, b"nor this\n")
    return strategies.build_unverified("loop", models, example)


@dataclass(frozen=True)
class Made(strategies.Strategy):
    """A strategy of this file."""

    build: Callable[..., BuildResult] | None = None

    def builder(self, *, tune_seconds: float = 0.0) -> Callable[..., BuildResult]:
        assert self.build is not None
        return self.build


def install() -> None:
    """Put them into the registry."""
    for build in (kill, crash, hang, leave, hoard, broken, refused, chatter):
        strategies.STRATEGIES[build.__name__] = Made("", "", "made for a test", build=build)
