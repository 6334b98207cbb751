"""A run from its plan to its last measurement: resumed rows, the time budget, interrupts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace

from ensemble.bench import availability, roofline, schedule
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors.executor import Executor
from ensemble.bench.executors.fresh_process import fresh_processes
from ensemble.bench.executors.in_process import in_process
from ensemble.bench.measurement import Measurement
from ensemble.bench.report.progress import Update, show_progress
from ensemble.bench.report.words import case_name
from ensemble.bench.summary import Run, Summary, merged
from ensemble.bench.workload import Workload
from ensemble.errors import RankError, exit_code

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Session:
    """What was measured, what was not, and why."""

    run: Run
    planned: int
    left: tuple[Case, ...]
    stopped: str  # why it stopped early; empty where it did not
    exit_code: int = 0  # of the session alone: 0 also where its minutes were over


def measure_all(
    config: Config,
    run: Run,
    workload: Workload,
    *,
    save: Callable[[Run], None],
    say: Callable[[str], None],
    executor: Executor | None = None,
    show: Callable[[int], AbstractContextManager[Update]] = show_progress,
) -> Session:
    """Measure each case of the plan that `run` lacks, and save after each measurement.

    Ctrl-C, SIGTERM, the time budget, or a rank that ends stop the session; what is finished stays.

    Args:
        config: the configuration.
        run: its environment, and the rows that are there already.
        workload: the models and images.
        save: called with the run as it grows.
        say: prints a line.
        executor: where to measure; by default in fresh processes, or in this one as configured.
        show: is given the number of measurements to come, and gives the progress display.
    """
    cases, options = config.plan(), config.measure
    summaries = {row.case: row for row in run.results}
    missing = schedule.missing(cases, summaries, options)
    if options.resume:
        say(f"Resuming {options.resume}: {len(missing)} of {len(cases)} rows are missing")
    limits = roofline.limits_of(missing, workload.device) if options.roofline else None

    def take(measurements: Sequence[Measurement]) -> None:
        nonlocal run
        for measurement in measurements:
            case = measurement.case
            before = summaries.get(case)
            if case not in planned or not schedule.wants_more(before, options):
                continue  # the reference, which was measured often enough
            summary = merged(before, measurement)
            if limits is not None and before is None:
                summary = replace(summary, roofline=roofline.of_case(case, limits, workload))
            summaries[case] = summary
        run = replace(run, results=_ordered(summaries.values(), cases))
        save(run)

    def task_of(case: Case) -> Task | None:
        summary = summaries.get(case)
        if not schedule.wants_more(summary, options):
            return None
        return Task(case, len(summary.processes), summary.picked) if summary else Task(case)

    planned = set(cases)
    if unavailable := availability.unavailable(missing, config, workload.device):
        take(unavailable)  # no process has to start to find that out
    missing = schedule.missing(cases, summaries, options)
    for line in availability.warnings(missing, workload.device):
        say(line)
    deadline = time.monotonic() + 60 * (options.max_minutes or float("inf"))
    executor = executor or (fresh_processes if options.processes else in_process)
    stopped, code = "", 0
    try:
        with (
            show(len(missing) * schedule.first_rounds(options)) as update,
            executor(config, workload) as execute,
        ):

            def on_progress(case: Case, stage: str, done: float) -> None:
                count = len(summaries[case].processes) if case in summaries else 0
                process = f", process {count + 1}" if options.processes else ""
                update(f"{case_name(case)}{process}", stage, done)

            for batch in schedule.batches(cases, summaries, config):
                with closing(execute(batch, task_of, on_progress)) as tasks:
                    for measurements in tasks:
                        take(measurements)
                        if time.monotonic() > deadline:
                            stopped = f"{options.max_minutes:g} minutes are over"
                            break
                if stopped:
                    break
    except KeyboardInterrupt as error:
        stopped, code = str(error) or INTERRUPTED, exit_code(error)
    except RankError as error:
        stopped, code = str(error), 1
    left = tuple(schedule.missing(cases, summaries, options))
    # A time budget that ends when nothing is left has stopped nothing.
    return Session(run, len(cases), left, stopped if code or left else "", code)


def _ordered(rows: Iterable[Summary], order: Sequence[Case]) -> tuple[Summary, ...]:
    """Rows in the order of the plan; those of other cases, of an earlier run, come last."""
    places = {case: index for index, case in enumerate(order)}
    return tuple(sorted(rows, key=lambda row: places.get(row.case, len(places))))
