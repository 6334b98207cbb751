"""A run from its plan to its last measurement: resumed rows, the time budget, interrupts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial

from ensemble.bench import availability, roofline, schedule
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors.executor import Executor
from ensemble.bench.executors.fresh_process import fresh_processes
from ensemble.bench.executors.in_process import in_process
from ensemble.bench.measurement import Measurement
from ensemble.bench.report.labels import case_name
from ensemble.bench.report.progress import Update, show_progress
from ensemble.bench.summary import Run, merged
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


class _Rows:
    """The rows of a run as they grow: which are wanted, and what was measured."""

    def __init__(
        self, config: Config, run: Run, workload: Workload, save: Callable[[Run], None]
    ) -> None:
        self._config, self._workload, self._save = config, workload, save
        self.run, self.plan = run, config.plan()
        self.summaries = {row.case: row for row in run.results}
        self._places = {case: index for index, case in enumerate(self.plan)}
        limited = [case for case in self.missing() if config.measure.roofline]
        self._limits = workload.limits_of(limited)

    def missing(self) -> list[Case]:
        """The cases that were not measured, or by too few processes."""
        return schedule.missing(self.plan, self.summaries, self._config)

    def task_of(self, case: Case) -> Task | None:
        """The next task of a case, None where it needs no further process."""
        summary = self.summaries.get(case)
        if not schedule.wants_more(summary, self._config):
            return None
        return Task(case, len(summary.processes), summary.picked) if summary else Task(case)

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Merge measurements into their rows, and save the run."""
        for measurement in measurements:
            case = measurement.case
            before = self.summaries.get(case)
            if case not in self._places or not schedule.wants_more(before, self._config):
                continue  # the reference, which was measured often enough
            summary = merged(before, measurement)
            if self._config.measure.roofline and before is None:
                found = roofline.of_case(case, self._limits, self._workload)
                summary = replace(summary, roofline=found)
            self.summaries[case] = summary
        # Rows of other cases, of an earlier run, come last.
        places, last = self._places, len(self._places)
        ordered = sorted(self.summaries.values(), key=lambda row: places.get(row.case, last))
        self.run = replace(self.run, results=tuple(ordered))
        self._save(self.run)


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
    options, rows = config.measure, _Rows(config, run, workload, save)
    if options.resume:
        say(
            f"Resuming {options.resume}: {len(rows.missing())} of {len(rows.plan)} rows are missing"
        )
    if unavailable := availability.unavailable(rows.missing(), config, workload.device):
        rows.add(unavailable)  # no process has to start to find that out
    missing = rows.missing()
    for line in availability.warnings(missing, workload.device):
        say(line)
    executor = executor or (fresh_processes if options.processes else in_process)
    share = schedule.shares_workers(config, str(workload.device))
    deadline = time.monotonic() + 60 * (options.max_minutes or float("inf"))
    stopped, code = "", 0
    try:
        with (
            show(len(missing) * schedule.processes(config)) as update,
            executor(config, workload) as execute,
        ):
            on_progress = partial(_report_progress, update, rows, bool(options.processes))
            for group in schedule.groups(rows.plan, rows.summaries, config, share_workers=share):
                with closing(execute(group, rows.task_of, on_progress)) as tasks:
                    for measurements in tasks:
                        rows.add(measurements)
                        if time.monotonic() > deadline:
                            stopped = f"{options.max_minutes:g} minutes are over"
                            break
                if stopped:
                    break
    except KeyboardInterrupt as error:
        stopped, code = str(error) or INTERRUPTED, exit_code(error)
    except RankError as error:
        stopped, code = str(error), 1
    left = tuple(rows.missing())
    # A time budget that ends when nothing is left has stopped nothing.
    return Session(rows.run, len(rows.plan), left, stopped if code or left else "", code)


def _report_progress(
    update: Update, rows: _Rows, in_processes: bool, case: Case, stage: str, done: float
) -> None:
    summary = rows.summaries.get(case)
    number = len(summary.processes) + 1 if summary else 1
    process = f", process {number}" if in_processes else ""
    update(f"{case_name(case)}{process}", stage, done)
