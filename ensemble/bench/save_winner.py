"""`--save`: the fastest strategy of a run as a file, from which it starts again at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ensemble.bench.config import Config
from ensemble.bench.models_in_place import models_in_place
from ensemble.bench.summary import Run, Summary
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, UnavailableError, drop_frames
from ensemble.formatting import count
from ensemble.machine import memory
from ensemble.machine.dtypes import numeric_format
from ensemble.machine.precision import float32_precision
from ensemble.strategies import build
from ensemble.strategies.saving import save


def save_winner(config: Config, workload: Workload, run: Run, *, say: Callable[[str], None]) -> int:
    """Build the fastest row of the first grid point that can be saved, with a plan for each batch
    size of the run, and save it; returns the exit code.

    Raises:
        InputError: the file cannot be written, or memory does not suffice.
    """
    path, case = config.report.save, config.plan()[0]
    assert path is not None
    rows, refusals = fastest_first(run.results), list[str]()
    for row in rows:
        name, numbers = row.picked or row.case.strategy, numeric_format(row.case.dtype)
        try:
            with (
                memory.out_of_memory_as_input_error("the winner is saved", argument="save"),
                float32_precision(numbers.float32_precision),
            ):
                models, example = models_in_place(workload, case, numbers.dtype)
                largest = max(config.models.batch_size)
                forward = build(name, models, example, max_batch=largest)
                forward.prepare(config.models.batch_size)
                size = save(forward, path)
        except UnavailableError as error:
            drop_frames(error)
            refusals.append(f"{name}: {error}")
            continue
        except InputError as error:
            raise InputError(error.message, argument="save") from error
        say(_sentence(path, size, row, rows[0], case.num_models, refusals))
        return 0
    reason = refusals[0] if refusals else "no strategy was measured that can be saved"
    print(f"error: --save: {reason}", file=sys.stderr)
    return 1


def fastest_first(results: Sequence[Summary]) -> list[Summary]:
    """The rows of the first grid point that have a speedup, the fastest first."""
    if not results:
        return []
    point = results[0].case.grid_point
    rows = [
        row
        for row in results
        if row.case.grid_point == point and row.speedup and not row.case.is_self_check
    ]
    return sorted(rows, key=lambda row: row.speedup or 0.0, reverse=True)


def _sentence(
    path: str, size: int, row: Summary, winner: Summary, num_models: int, refusals: Sequence[str]
) -> str:
    what = f"{path}: {count(num_models, 'model')} by {row.name}, {size / 1e6:,.1f} MB"
    load = f'forward = ensemble.load("{path}") starts it without tuning'
    if row is winner:
        return f"{what}; {load}."
    return f"{what}; {load}. The fastest, {winner.name}, cannot be saved: {refusals[0]}"
