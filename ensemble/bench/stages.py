"""What is being done to a row, as the progress tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ensemble.strategies import STRATEGIES

# Called with what is being done to a row, and how much of it is done (0 to 1).
Stage = Callable[[str, float], None]

BUILDING, TIMING = "build and first call", "timing"
COMPILING = "compiling kernels, once per installation"


@contextmanager
def telling(strategy: str, progress: Stage) -> Iterator[None]:
    """While it is built: tell when numba compiles kernels, which it does once and then keeps.

    Within the compilation of a function are those of all that it calls: that is told once.
    """
    if not STRATEGIES[strategy].has_kernels or find_spec("numba") is None:
        yield
        return
    from numba.core import event

    class Listener(event.Listener):
        depth = 0

        def on_start(self, _: object) -> None:
            if self.depth == 0:
                progress(COMPILING, 0.0)
            self.depth += 1

        def on_end(self, _: object) -> None:
            self.depth -= 1
            if self.depth == 0:
                progress(BUILDING, 0.0)

    with event.install_listener("numba:compile", Listener()):
        yield
