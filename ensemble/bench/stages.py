"""The stages of measuring a case, as the progress line shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ensemble import strategies
from ensemble.machine import jit

# Called with a stage, and the share of it that is done (0 to 1).
OnStage = Callable[[str, float], None]

BUILDING, TIMING = "build and first call", "timing"
COMPILING = "compiling kernels, once per installation"


@contextmanager
def reported_compilation(strategy: str, on_stage: OnStage) -> Iterator[None]:
    """Report when numba compiles kernels within, which it does once and then caches.

    The compilation of a function contains those of all that it calls: that is one report.
    """
    if not strategies.get(strategy).has_kernels or not jit.is_usable():
        yield
        return
    from numba.core import event

    class Listener(event.Listener):
        depth = 0

        def on_start(self, _: object) -> None:
            if self.depth == 0:
                on_stage(COMPILING, 0.0)
            self.depth += 1

        def on_end(self, _: object) -> None:
            self.depth -= 1
            if self.depth == 0:
                on_stage(BUILDING, 0.0)

    with event.install_listener("numba:compile", Listener()):
        yield
