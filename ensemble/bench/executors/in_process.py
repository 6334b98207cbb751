"""Measure cases in this process: for debuggers and profilers, in workers, and on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from ensemble.bench.case import REFERENCE, Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors.executor import Execute, OnProgress, TaskOf
from ensemble.bench.measure import measure, time_alone
from ensemble.bench.measurement import FAILED, Measurement
from ensemble.bench.setup import Setup, SetupError, local_setup
from ensemble.bench.stages import OnStage
from ensemble.bench.workload import Workload
from ensemble.machine.dtypes import FLOAT32


@contextmanager
def in_process(config: Config, workload: Workload) -> Iterator[Execute]:
    """An executor of this process."""
    yield partial(execute, partial(setup_of, config, workload), config)


def setup_of(
    config: Config, workload: Workload, cases: Sequence[Case], *, is_first: bool = True
) -> Setup:
    """The setup of cases as configured; see `local_setup` and `with_reference_alone`."""
    setup = local_setup(
        cases,
        workload.models,
        workload.images,
        reduce=config.models.reduce,
        tune_seconds=config.measure.tune_seconds,
        is_first=is_first,
    )
    return with_reference_alone(setup, cases, config)


def with_reference_alone(setup: Setup, cases: Sequence[Case], config: Config) -> Setup:
    """The setup with calls of the reference, timed before anything else is built.

    Raises:
        SetupError: a call failed.
    """
    if config.load is not None or all(case.is_reference for case in cases):
        return setup
    try:
        return replace(setup, reference_alone=time_alone(setup, config.measure))
    except Exception as error:
        why = setup.backend.explain(error, REFERENCE, FLOAT32)
        raise SetupError(f"the reference failed: {why}") from error


def execute(
    make: Callable[[Sequence[Case]], Setup],
    config: Config,
    cases: Sequence[Case],
    task_of: TaskOf,
    on_progress: OnProgress,
) -> Generator[Sequence[Measurement]]:
    """Measure the cases of one grid point in a setup that `make` gives."""
    on_progress(cases[0], "reference", 0.0)
    try:
        setup = make(cases)
    except SetupError as error:
        yield [Measurement(case, FAILED, str(error)) for case in cases]
        return
    for case in cases:
        task = task_of(case)
        if task is not None:
            yield [measure_task(task, setup, config, on_stage=partial(on_progress, case))]


def measure_task(task: Task, setup: Setup, config: Config, *, on_stage: OnStage) -> Measurement:
    """Time a case in pairs with the reference, or test it under load."""
    if config.load is None:
        options, reduce = config.measure, config.models.reduce
        return measure(task, setup, options, reduce=reduce, on_stage=on_stage)
    from ensemble.bench.load.measure_load import measure_under_load

    seed = config.run.seed + task.process
    return measure_under_load(
        task.case, setup, config.load, config.measure, seed=seed, on_stage=on_stage
    )
