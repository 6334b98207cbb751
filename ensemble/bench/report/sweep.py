"""What a grid of results says: where a strategy starts to win, and what it costs. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.bench.summary import Summary

Line = tuple[str, str, int, int]  # strategy, dtype, batch, px
Cell = tuple[int, int, int]  # N, batch, px


@dataclass(frozen=True)
class BreakEven:
    """From how many models on a strategy is surely faster than the reference; None: nowhere."""

    line: Line
    num_models: int | None
    largest: int  # the largest N that was measured
    unsure: tuple[int, ...] = ()  # those N of which nothing may be claimed


def lines(results: Sequence[Summary]) -> dict[Line, list[Summary]]:
    """The rows of each line, by N; without the reference and the self-check."""
    found: dict[Line, list[Summary]] = {}
    for row in results:
        if not row.case.is_reference and not row.case.is_self_check:
            found.setdefault(row.case.line, []).append(row)
    return {line: sorted(rows, key=lambda row: row.case.num_models) for line, rows in found.items()}


def cells(results: Sequence[Summary]) -> dict[Cell, list[Summary]]:
    """The rows of each cell of the grid, in their order."""
    found: dict[Cell, list[Summary]] = {}
    for row in results:
        found.setdefault(row.case.cell, []).append(row)
    return found


def break_even(rows: Sequence[Summary]) -> BreakEven:
    """The smallest N from which, at it and at every larger one measured, the whole interval of the
    speedup is above 1. Of a line that wins, loses and wins again the last crossing counts; an N of
    which nothing may be claimed (too noisy, failed) counts for neither, and is named.

    Args:
        rows: one line, by N.
    """
    start = None
    claimed = [row for row in rows if row.speedup_interval is not None and not row.inconclusive]
    for row in reversed(claimed):
        if not surely_faster(row):
            break
        start = row.case.num_models
    unsure = tuple(row.case.num_models for row in rows if row not in claimed)
    return BreakEven(rows[0].case.line, start, rows[-1].case.num_models, unsure)


def surely_faster(row: Summary) -> bool:
    """Is the whole interval of the speedup above 1, and the row quiet enough to claim it?"""
    interval = row.speedup_interval
    return interval is not None and not row.inconclusive and interval[0] > 1


def fastest(rows: Sequence[Summary]) -> Summary | None:
    """The row of a cell with the largest speedup that may be claimed, the reference included.

    None where nothing may be claimed of any other row.
    """
    sure = [
        row
        for row in rows
        if row.speedup is not None and not row.inconclusive and not row.case.is_self_check
    ]
    if all(row.case.is_reference for row in sure):
        return None
    return max(sure, key=lambda row: row.speedup or 0.0)


def break_even_calls(row: Summary, reference: Summary) -> float | None:
    """Calls after which a strategy has won back its build and first call.

    Both sides spend their build and first call; None where the strategy is not surely faster.
    """
    spent = [row.build_s, row.first_call_s, reference.build_s, reference.first_call_s]
    call, reference_call = row.median_s, row.reference_median_s
    if None in spent or call is None or reference_call is None or not surely_faster(row):
        return None
    build, first, reference_build, reference_first = (float(value or 0) for value in spent)
    return max(0.0, (build + first - reference_build - reference_first) / (reference_call - call))


def extra_memory(row: Summary, reference: Summary) -> int | None:
    """Peak memory of a strategy beyond that of the reference, in bytes."""
    if row.peak_memory_bytes is None or reference.peak_memory_bytes is None:
        return None
    return row.peak_memory_bytes - reference.peak_memory_bytes
