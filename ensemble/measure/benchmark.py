"""The loop over the grid: cases in their order, one `Result` at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, product

import torch
from torch import nn

from ensemble.measure.bench import Bench, make_bench, measure_limits, with_roofline
from ensemble.measure.row import measure
from ensemble.models.workload import Workload
from ensemble.options import Config
from ensemble.records import REFERENCE, SELF_CHECK, Case, Result
from ensemble.report.words import case_name
from ensemble.strategies import BEST, best

# Called with what is measured in words, what is being done to it, and how much of that is done.
Progress = Callable[[str, str, float], None]


def plan(
    config: Config,
    models: Sequence[nn.Module],
    device: torch.device,
    on_one_device: Callable[[int], int] = int,
) -> list[Case]:
    """The rows to measure, in their order: cell by cell of the grid.

    `best` stands for the reference and the strategy that is picked, for as many models as are
    `on_one_device` of N.
    """
    cells = product(config.image_size, config.batch_size, config.num_models)
    return [
        Case(name, num_models, batch_size, image_size, dtype, config.inputs)
        for image_size, batch_size, num_models in cells
        for name, dtype in _names(config, models[: on_one_device(num_models)], device)
    ]


def run(
    config: Config,
    cases: Sequence[Case],
    workload: Workload,
    *,
    progress: Progress,
    make: Callable[[Sequence[Case]], Bench | str] | None = None,
) -> Iterator[Result]:
    """Measure cases of `plan`; a failure costs its own row only.

    Args:
        config: how to measure.
        cases: what to measure, those of one cell together.
        workload: the first N of its models serve for each N; shared inputs are the first B of its
            views, per-model inputs the first N * B.
        make: gives the bench of a cell (default: `make_bench`, on the workload's device).
    """
    dtypes = [case.dtype for case in cases] if config.roofline else []
    limits = measure_limits(dtypes, workload.device)
    for _, own in groupby(cases, key=lambda case: case.cell):
        cell = list(own)
        progress(case_name(cell[0]), "reference", 0.0)
        if make is None:
            bench = make_bench(cell, workload.models, workload.views, config.reduce)
        else:
            bench = make(cell)
        for case in cell:
            if isinstance(bench, str):
                yield Result(case, status="failed", error=bench)
                continue
            row = measure(case, bench, config, progress=partial(progress, case_name(case)))
            yield with_roofline(row, limits, workload)


def _names(
    config: Config, models: Sequence[nn.Module], device: torch.device
) -> list[tuple[str, str]]:
    """The strategies and dtypes of one cell, each once."""
    names: list[tuple[str, str]] = []
    for dtype, name in product(config.dtype, config.strategies):
        picked = best.pick(models, device.type, dtype) if name == BEST else name
        names += [(REFERENCE, "float32")] if name == BEST else []
        names.append((picked, dtype))
    names += [(SELF_CHECK, "float32")] if config.self_check else []
    return list(dict.fromkeys(names))
