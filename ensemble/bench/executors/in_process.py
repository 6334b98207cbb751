"""The loop over the grid: cases in their order, one `Result` at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol

from ensemble.bench import measure as row
from ensemble.bench.config import Config
from ensemble.bench.records import Case, Result
from ensemble.bench.report.words import case_name
from ensemble.bench.setup import (
    Cell,
    make_cell,
    measure_limits,
    with_roofline,
)
from ensemble.bench.stages import Stage
from ensemble.bench.workload import Workload

# Called with what is measured in words, what is being done to it, and how much of that is done.
Progress = Callable[[str, str, float], None]
Make = Callable[[Sequence[Case]], Cell | str]  # the cases of a cell -> the cell


class Measure(Protocol):
    """Makes a row of a case."""

    def __call__(self, case: Case, cell: Cell, config: Config, *, progress: Stage) -> Result: ...


def run(
    config: Config,
    cases: Sequence[Case],
    workload: Workload,
    *,
    progress: Progress,
    measure: Measure = row.measure,
    make: Make | None = None,
) -> Iterator[Result]:
    """Measure cases of `Config.plan`; a failure costs its own row only.

    Args:
        config: how to measure.
        cases: what to measure, those of one cell together.
        workload: the first N of its models serve for each N; shared inputs are the first B of its
            images, per-model inputs the first N * B.
        make: makes the cell of its cases (default: `make_cell`, on the workload's device).
    """
    dtypes = [case.dtype for case in cases] if config.roofline else []
    limits = measure_limits(dtypes, workload.device)
    for _, group in groupby(cases, key=lambda case: case.cell):
        together = list(group)
        progress(case_name(together[0]), "reference", 0.0)
        if make is None:
            cell = make_cell(together, workload.models, workload.images, config)
        else:
            cell = make(together)
        for case in together:
            if isinstance(cell, str):
                yield Result(case, status="failed", error=cell)
                continue
            found = measure(case, cell, config, progress=partial(progress, case_name(case)))
            yield with_roofline(found, limits, workload)
