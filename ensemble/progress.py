"""Progress on stderr: a bar on a terminal, plain lines elsewhere. Imports no torch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def show_progress(rows: int) -> Iterator[Callable[[str, str, float], None]]:
    """Give a function `(row, stage, share of the stage done)` that shows how far a run is."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(rows) as update:
        yield update


@contextmanager
def _bar(rows: int) -> Iterator[Callable[[str, str, float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    started: list[str] = []
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=rows)

        def update(row: str, stage: str, done: float) -> None:
            if not started or started[-1] != row:
                started.append(row)
            share = 0.1 + 0.9 * done if stage == "timing" else 0.0
            bar.update(task, description=f"{row}: {stage}", completed=len(started) - 1 + share)

        yield update


@contextmanager
def _lines(rows: int) -> Iterator[Callable[[str, str, float], None]]:
    last = ""

    def update(row: str, stage: str, done: float) -> None:
        nonlocal last
        line = f"{row}: {stage}"
        if line != last:
            print(line, file=sys.stderr, flush=True)
            last = line

    yield update
