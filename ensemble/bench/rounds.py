"""Which case is measured next, by a fresh process each: in rounds, and then where it is unsure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ensemble.bench.config import Config
from ensemble.bench.records import Case, Result
from ensemble.statistics import half_width

FIRST_ROUNDS = 3  # before the spread between processes is asked


def rounds(
    cases: Sequence[Case], rows: Mapping[Case, Result], config: Config
) -> Iterator[Iterator[Case]]:
    """Groups of cases to measure, a process each, until every row is sure or has had all it may.

    The first group is the rounds that every row gets, one after another, so that the processes of a
    row are spread over the run, and a slow minute of the machine does not hit one row alone. Each
    later one is the rows that are still unsure, the most unsure first: time that runs out has gone
    where it was needed. `rows` is read as it grows. The reference has no
    process of its own where it is timed beside another strategy of its cell; under load nothing is.
    """
    alone = {case.cell for case in cases} - {case.cell for case in cases if not case.is_reference}
    timed = [
        case for case in cases if config.scenario or not case.is_reference or case.cell in alone
    ]
    first = first_rounds(config)
    yield (
        case
        for number in range(first)
        for case in timed
        if (row := rows.get(case)) is None or (row.status == "ok" and len(row.processes) <= number)
    )
    for _ in range(config.processes - first):
        unsure = [case for case in timed if wants_more(rows.get(case), config)]
        yield iter(sorted(unsure, key=lambda case: -_width(rows.get(case))))
    # Where all that was beside it has failed.
    yield (case for case in cases if case.is_reference and case not in rows)


def wants_more(row: Result | None, config: Config) -> bool:
    """Does a row need another process?"""
    if row is None:
        return True
    done = len(row.processes)
    if row.status != "ok" or done >= config.processes:
        return False
    if done < first_rounds(config):
        return True
    interval = row.speedup_interval
    return interval is not None and 100 * half_width(interval) > config.precision


def _width(row: Result | None) -> float:
    interval = row and row.speedup_interval
    return half_width(interval) if interval else math.inf


def first_rounds(config: Config) -> int:
    """How many processes every row has; one, this one, where rows have none of their own."""
    return max(1, min(FIRST_ROUNDS, config.processes))


def in_each(config: Config) -> Config:
    """The configuration of one process: what the first rounds share is asked of them together.

    A run under load is judged by itself, and has its minimum duration whole.
    """
    if config.scenario:
        return config
    rounds = first_rounds(config)
    pairs, seconds = -(-config.min_pairs // rounds), config.min_seconds / rounds
    return replace(config, min_pairs=pairs, min_seconds=seconds)


def merged(row: Result | None, new: Result) -> Result:
    """A row with what a further process found. One that failed fails the row, which says so."""
    if row is None:
        return new
    heads = {_head(note) for note in row.notes}
    notes = row.notes + tuple(note for note in new.notes if _head(note) not in heads)
    both = replace(
        row,
        processes=row.processes + new.processes,
        notes=notes,
        max_rel_error=_largest(row.max_rel_error, new.max_rel_error),
        error_float64=_largest(row.error_float64, new.error_float64),
    )
    if new.status == "ok":
        return both
    return replace(
        both, status=new.status, error=f"in process {len(row.processes) + 1}: {new.error}"
    )


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _head(note: str) -> str:
    """A note without the figures in brackets, which are another in each process."""
    return note.partition(" (")[0]
