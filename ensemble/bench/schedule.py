"""Which cases are measured next: in rounds of fresh processes, then where the CI is too wide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice

from ensemble.bench.case import Case
from ensemble.bench.config import Config, MeasureOptions
from ensemble.bench.measurement import OK
from ensemble.bench.summary import Summary
from ensemble.statistics import half_width

FIRST_ROUNDS = 3  # processes of each case before the spread between them is considered
# Workers that start together. What they import takes 1.8 to 2.8 s of one core each: with two of
# them, one waited for the other while its core was idle.
WORKERS_AT_ONCE = 3

Summaries = Mapping[Case, Summary]


def groups(cases: Sequence[Case], summaries: Summaries, config: Config) -> Iterator[Sequence[Case]]:
    """Groups of cases that an executor measures together. `summaries` is read as it grows.

    In this process, and on ranks: the cases of a grid point, each once. In fresh processes: a few
    at a time, one process each, until every CI is narrow enough or its case has had all its
    processes.
    """
    if not config.measure.processes:
        missing = (case for case in cases if case not in summaries)
        for _, at_one_point in groupby(missing, key=lambda case: case.grid_point):
            yield tuple(at_one_point)
        return
    for one_round in _rounds(cases, summaries, config):
        while group := tuple(islice(one_round, WORKERS_AT_ONCE)):
            yield group


def _rounds(
    cases: Sequence[Case], summaries: Summaries, config: Config
) -> Iterator[Iterator[Case]]:
    """The first rounds that every case gets, then rounds of those whose CI is too wide.

    In a round cases follow one another, so that the processes of a case are spread over the run: a
    slow minute of the machine does not hit one case alone. Later rounds start with the widest CI.
    The reference has no separate process where it is timed in pairs with another strategy at its
    grid point; a load test has no pairs.
    """
    options, has_pairs = config.measure, config.load is None
    paired = {case.grid_point for case in cases if has_pairs and not case.is_reference}
    timed = [case for case in cases if not case.is_reference or case.grid_point not in paired]
    first = first_rounds(options)
    yield (
        case
        for number in range(first)
        for case in timed
        if (row := summaries.get(case)) is None or (row.status == OK and _count(row) <= number)
    )
    for _ in range(options.processes - first):
        wide = [case for case in timed if wants_more(summaries.get(case), options)]
        yield iter(sorted(wide, key=lambda case: -_width(summaries.get(case))))
    # Where every strategy that the reference was paired with has failed.
    yield (case for case in cases if case.is_reference and case not in summaries)


def wants_more(summary: Summary | None, options: MeasureOptions) -> bool:
    """Does a case need another process?"""
    if summary is None:
        return True
    done = _count(summary)
    if summary.status != OK or done >= options.processes:
        return False
    if done < first_rounds(options):
        return True
    interval = summary.speedup_interval
    return interval is not None and 100 * half_width(interval) > options.max_ci_percent


def missing(cases: Sequence[Case], summaries: Summaries, options: MeasureOptions) -> list[Case]:
    """The cases that were not measured, or by too few processes."""
    return [case for case in cases if wants_more(summaries.get(case), options)]


def first_rounds(options: MeasureOptions) -> int:
    """How many processes every case gets; 1 where cases are measured in this process."""
    return max(1, min(FIRST_ROUNDS, options.processes))


def of_one_process(config: Config) -> Config:
    """The configuration of a worker: the first rounds share the minimum pairs and seconds.

    A load test is judged by its own duration, which is not shared.
    """
    if config.load is not None:
        return config
    rounds, options = first_rounds(config.measure), config.measure
    pairs, seconds = -(-options.min_pairs // rounds), options.min_seconds / rounds
    return replace(config, measure=replace(options, min_pairs=pairs, min_seconds=seconds))


def _count(summary: Summary) -> int:
    return len(summary.processes)


def _width(summary: Summary | None) -> float:
    interval = summary and summary.speedup_interval
    return half_width(interval) if interval else math.inf
