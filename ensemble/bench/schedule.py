"""Which cases are measured next: in rounds of fresh processes, as many as planned."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from math import atanh, ceil, log

from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.measurement import OK
from ensemble.bench.summary import Summary
from ensemble.statistics import log_mean

# Processes of a load test: each of them searches a rate, which takes minutes.
LOAD_PROCESSES = 3
MAX_PLANNED = 30  # processes of a row, where --max_ci_percent asks for more than --processes
# Workers that start together. What they import takes 1.8 to 2.8 s of one core each: with two of
# them, one waited for the other while its core was idle.
WORKERS_AT_ONCE = 3

Summaries = Mapping[Case, Summary]


def shares_workers(config: Config, device: str) -> bool:
    """Does a fresh process measure all cases of a grid point, each once, in random order?

    On an accelerator, where a process takes 4 to 12 s to start and to load the models: a sweep of
    six N with six strategies would start 180. On a CPU a process measures one case, because there
    what a case leaves behind is measurable: heap, page faults, OpenMP teams. A load test is minutes
    long, and its queues and threads are its own.
    """
    return bool(config.measure.processes) and config.load is None and not device.startswith("cpu")


def groups(
    cases: Sequence[Case], summaries: Summaries, config: Config, *, share_workers: bool = False
) -> Iterator[Sequence[Case]]:
    """Groups of cases that an executor measures together. `summaries` is read as it grows.

    In this process, and on ranks: the cases of a grid point, each once. In fresh processes: those
    of a few processes at a time, until every case has had its processes. With `share_workers` see
    the function of that name.
    """
    if not config.measure.processes:
        missing = (case for case in cases if case not in summaries)
        for _, at_one_point in groupby(missing, key=lambda case: case.grid_point):
            yield tuple(at_one_point)
        return
    for number, one_round in enumerate(_rounds(cases, summaries, config)):
        batches: Iterator[list[Case]] = ([case] for case in one_round)
        if share_workers:
            batches = _shuffled_grid_points(one_round, seed=f"{config.run.seed} {number}")
        while group := tuple(chain.from_iterable(islice(batches, WORKERS_AT_ONCE))):
            yield group


def _shuffled_grid_points(cases: Iterable[Case], *, seed: str) -> Iterator[list[Case]]:
    """The cases of each grid point in random order: what a case leaves behind, and drift of the
    device's temperature, then meet another case in each process."""
    generator = random.Random(seed)
    for _, at_one_point in groupby(cases, key=lambda case: case.grid_point):
        yield generator.sample(batch := list(at_one_point), len(batch))


def _rounds(
    cases: Sequence[Case], summaries: Summaries, config: Config
) -> Iterator[Iterator[Case]]:
    """A process of each case in every round, until no case wants more.

    In a round cases follow one another, so that the processes of a case are spread over the run: a
    slow minute of the machine does not hit one case alone. The reference has no process of its own
    where it is timed in pairs with another strategy of its grid point; a load test has no pairs.
    """
    under_load = config.load is not None
    paired = {case.grid_point for case in cases if not case.is_reference}
    timed = [
        case
        for case in cases
        if under_load or not case.is_reference or case.grid_point not in paired
    ]
    for number in range(max(processes(config), MAX_PLANNED)):
        yield (
            case
            for case in timed
            if wants_more(row := summaries.get(case), config)
            and (row is None or _count(row) <= number)
        )
    # Where every strategy that the reference was paired with has failed.
    yield (case for case in cases if case.is_reference and case not in summaries)


def wants_more(summary: Summary | None, config: Config) -> bool:
    """Does a case need another process?"""
    if summary is None:
        return True
    return summary.status == OK and _count(summary) < _planned(summary, config)


def _planned(summary: Summary, config: Config) -> int:
    """How many processes a case gets: a fixed number, or planned once, from the first ones.

    Never decided by the interval as it grows: rows that stop because theirs happens to be narrow
    would hold the truth in half of all runs. The plan is that of Stein (A two-sample test for a
    linear hypothesis whose power is independent of the variance, Annals of Mathematical Statistics
    1945).
    """
    first, limit = processes(config), config.measure.max_ci_percent
    pilot = log_mean(summary.process_speedups[:first])
    if limit is None or config.load or pilot is None or _count(summary) < first:
        return first
    low, high = pilot.interval()
    narrower = log(high / low) / 2 / atanh(min(max(limit, 0.1), 99.0) / 100)
    return max(first, min(MAX_PLANNED, ceil(first * narrower**2)))


def missing(cases: Sequence[Case], summaries: Summaries, config: Config) -> list[Case]:
    """The cases that were not measured, or by too few processes."""
    return [case for case in cases if wants_more(summaries.get(case), config)]


def processes(config: Config) -> int:
    """How many processes every case gets; 1 where cases are measured in this process."""
    most = LOAD_PROCESSES if config.load else config.measure.processes
    return max(1, min(most, config.measure.processes))


def of_one_process(config: Config) -> Config:
    """The configuration of a worker: processes share the minimum pairs and seconds.

    A load test is judged by its own duration, which is not shared.
    """
    if config.load is not None:
        return config
    count, options = processes(config), config.measure
    pairs, seconds = -(-options.min_pairs // count), options.min_seconds / count
    return replace(config, measure=replace(options, min_pairs=pairs, min_seconds=seconds))


def _count(summary: Summary) -> int:
    return len(summary.processes)
