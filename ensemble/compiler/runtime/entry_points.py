"""The compiled functions that Python calls, cached on disk by numba."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ensemble import gc_pause
from ensemble.compiler.kernels.kernel import STEP_DTYPE
from ensemble.compiler.runtime.overflow import mark
from ensemble.compiler.runtime.work_stealing import new_state, work


def _make_run(sources: str) -> Any:
    """`run`, cached for as long as the hash of its sources holds.

    numba alone invalidates the cache only if this file changes. The hash of all sources takes
    part as a closure variable: it must be a string, since compiled functions differ from process to
    process.
    """

    def run(  # type: ignore[no-untyped-def]  # numba infers the types
        table, tiled_table, arenas, scratches, state, worker, workers, num_models
    ):
        """All steps of all models; each of `workers` threads calls it once.

        table: the steps. tiled_table: the same with row tiling, for a thread that has a model to
        itself. arenas, scratches: an address for each worker. state: the address of `new_state`;
        all workers leave early once its STOP is not 0.
        """
        sources  # noqa: B018
        work(table, tiled_table, arenas, scratches, state, worker, workers, num_models)

    return _cached(run)


def _make_mark_overflows(sources: str) -> Any:
    """`mark_overflows`, cached like `run`; see `overflow.mark`."""

    def mark_overflows(  # type: ignore[no-untyped-def]
        values, images, pixels, channels, unpadded, marks
    ):
        sources  # noqa: B018
        mark(values, images, pixels, channels, unpadded, marks)

    return _cached(mark_overflows)


def _cached(function: Any) -> Any:
    """Compiled by numba, with its cache on disk."""
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no writable folder for its cache
        return njit(**options)(function)


# The sources of all generated code.
_COMPILER = Path(__file__).parents[1]
_FILES = sorted(
    [
        *_COMPILER.glob("codegen/*.py"),
        *_COMPILER.glob("kernels/*.py"),
        *(_COMPILER / "planning" / name for name in ("step.py", "vector_layout.py")),
        *(_COMPILER / "runtime" / name for name in ("overflow.py", "work_stealing.py")),
        Path(__file__),
    ]
)
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()
run, mark_overflows = _make_run(_SOURCES), _make_mark_overflows(_SOURCES)


def load() -> None:
    """Load both into this process: compile once per installation, then read from the cache."""
    if not run.signatures:
        table, addresses, state = np.zeros(0, STEP_DTYPE), np.zeros(1, np.int64), new_state(1, 0)
        with gc_pause.paused():
            run(table, table, addresses, addresses, state.ctypes.data, 0, 1, 0)  # no models
            mark_overflows(0, 0, 0, 0, 0, np.zeros(0, np.uint8))
