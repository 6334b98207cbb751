"""Progress on stderr: a bar on a terminal, plain lines elsewhere. Imports no torch."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[[str, str, float], None]


@contextmanager
def show_progress(rows: int) -> Iterator[Update]:
    """Yield a function `(row, stage, share of the stage done)` that updates the display."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(rows) as update:
        yield update


@contextmanager
def _bar(rows: int) -> Iterator[Update]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    started: list[str] = []
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=rows)

        def update(row: str, stage: str, done: float) -> None:
            if row not in started:
                started.append(row)
                bar.update(task, total=max(rows, len(started)))
            share = 0.1 + 0.9 * done if stage == "timing" else 0.0
            description = f"{row}: {stage}"
            bar.update(task, description=description, completed=len(started) - 1 + share)

        yield update


def _is_stdout_too() -> bool:
    try:
        return os.path.sameopenfile(1, 2)
    except OSError:
        return False


@contextmanager
def _lines(rows: int) -> Iterator[Update]:
    last = ""

    def update(row: str, stage: str, done: float) -> None:
        nonlocal last
        line = f"{row}: {stage}"
        if line != last:
            last = line
            try:
                print(line, file=sys.stderr, flush=True)
            except OSError as error:
                if isinstance(error, BrokenPipeError) and _is_stdout_too():
                    raise  # `2>&1 | head` has closed the pipe
                return  # a full disk or a closed terminal must not end the run

    yield update
