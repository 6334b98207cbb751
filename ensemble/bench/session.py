"""A run from its plan to its last row: what is resumed, a budget leaves out, a signal stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from importlib import import_module

from ensemble.bench import availability, rounds
from ensemble.bench.config import Config
from ensemble.bench.executors import fresh_process, in_process
from ensemble.bench.records import Case, Result, Run
from ensemble.bench.report.progress import show_progress
from ensemble.bench.report.words import case_name
from ensemble.bench.setup import measure_limits, with_roofline
from ensemble.bench.workload import Workload
from ensemble.errors import RankError, exit_code

INTERRUPTED = "interrupted"
LOADED_ROW = "ensemble.bench.load.measure"  # as `workers.ROW`, of a case under load
ShowProgress = Callable[[int], AbstractContextManager[in_process.Progress]]
# Gives the row of each case, as it comes, with others that changed by it.
Measure = Callable[
    [Config, Sequence[Case], Run, Workload, in_process.Progress, str],
    Generator[tuple[Result, ...], None, None],
]


@dataclass(frozen=True)
class Session:
    """What was measured, what was not, and why not."""

    run: Run
    planned: int
    left: tuple[Case, ...]
    stopped: str  # empty where nothing stopped it
    # What the session alone says: 0 where it came to its end, or to that of its minutes.
    exit_code: int = 0


def measure_all(
    config: Config,
    run: Run,
    workload: Workload,
    *,
    save: Callable[[Run], None],
    say: Callable[[str], None],
    show_progress: ShowProgress = show_progress,
    measure: Measure | None = None,
) -> Session:
    """Measure each case of the plan that `run` lacks, and save after each.

    `show_progress` is given how many rows there are to come, `measure` gives the rows (default: in
    processes of their own, or where there are none here). Ctrl-C, SIGTERM, the budget of minutes,
    or a rank that ends, ends it with what is finished.
    """
    cases = config.plan()
    missing = _missing(cases, run, config)
    if config.resume:
        say(f"Going on with {config.resume}: {len(missing)} of {len(cases)} rows are missing")
    lacking = availability.unavailable(missing, config, workload.device)
    if lacking:  # no process is started to find that out
        run = _with(run, lacking, cases)
        save(run)
        missing = _missing(cases, run, config)
    for line in availability.warnings(missing, workload.device):
        say(line)
    minutes = config.max_minutes or float("inf")
    deadline, stopped, code = time.monotonic() + 60 * minutes, "", 0
    measure = measure or (_in_processes if config.processes else in_this_process)
    row = LOADED_ROW if config.scenario else fresh_process.ROW
    try:
        with (
            show_progress(len(missing) * rounds.first_rounds(config)) as update,
            closing(measure(config, missing, run, workload, update, row)) as results,
        ):
            for several in results:
                run = _with(run, several, cases)
                save(run)
                if time.monotonic() > deadline:
                    stopped = f"{minutes:g} minutes are over"
                    break
    except KeyboardInterrupt as error:
        stopped, code = str(error) or INTERRUPTED, exit_code(error)
    except RankError as error:
        stopped, code = str(error), 1
    left = _missing(cases, run, config)
    # Minutes that were over when nothing was left have stopped nothing.
    return Session(run, len(cases), left, stopped if code or left else "", code)


def _with(run: Run, rows: Sequence[Result], order: Sequence[Case]) -> Run:
    """The run with these rows, new or in place of earlier ones; rows of other cases come last."""
    places = {case: index for index, case in enumerate(order)}
    by_case = {row.case: row for row in (*run.results, *rows)}
    ordered = sorted(by_case.values(), key=lambda row: places.get(row.case, len(places)))
    return replace(run, results=tuple(ordered))


def in_this_process(
    config: Config,
    cases: Sequence[Case],
    run: Run,
    workload: Workload,
    progress: in_process.Progress,
    row: str,
    make: in_process.Make | None = None,
) -> Generator[tuple[Result, ...]]:
    """Each case in this process; `make` as in `grid.run`."""
    measure: in_process.Measure = import_module(row).measure
    for result in in_process.run(
        config, cases, workload, progress=progress, measure=measure, make=make
    ):
        yield (result,)


def _in_processes(
    config: Config,
    cases: Sequence[Case],
    run: Run,
    workload: Workload,
    progress: in_process.Progress,
    row: str,
) -> Generator[tuple[Result, ...]]:
    """Each case in processes of its own; a row comes again after each of them, and with it the row
    of the reference where it was timed beside."""
    rows = {row.case: row for row in run.results}
    if not cases:
        return
    dtypes = [case.dtype for case in cases] if config.roofline else []
    limits = measure_limits(dtypes, workload.device)
    with fresh_process.jobs(rounds.in_each(config), workload, row=row) as job:

        def number(case: Case) -> int:
            return len(rows[case].processes) if case in rows else 0

        def tell(case: Case, stage: str, done: float) -> None:
            progress(f"{case_name(case)}, process {number(case) + 1}", stage, done)

        def take(new: Result) -> Result:
            before = rows.get(new.case)
            found = with_roofline(new, limits, workload) if before is None else new
            rows[new.case] = rounds.merged(before, found)
            return rows[new.case]

        def picked(case: Case) -> str | None:
            return rows[case].picked if case in rows else None

        def is_wanted(case: Case) -> bool:
            return case in cases and rounds.wants_more(rows.get(case), config)

        for several in rounds.rounds(cases, rows, config):
            measured = fresh_process.measure(
                job, several, picked=picked, progress=tell, number=number, is_wanted=is_wanted
            )
            for new, beside in measured:
                wanted = beside is not None and is_wanted(beside.case)
                yield tuple(map(take, (new, beside) if beside and wanted else (new,)))


def _missing(cases: Sequence[Case], run: Run, config: Config) -> tuple[Case, ...]:
    """The cases without a row, or whose row is not yet sure."""
    rows = {row.case: row for row in run.results}
    if not config.processes:
        return tuple(case for case in cases if case not in rows)
    return tuple(case for case in cases if rounds.wants_more(rows.get(case), config))
