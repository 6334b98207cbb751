"""The results of a grid: the break-even of each strategy, and its cost. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from ensemble.bench.summary import Summary
from ensemble.statistics import CONFIDENCE

Line = tuple[str, str, int, int]  # strategy, dtype, batch, px
GridPoint = tuple[int, int, int]  # N, batch, px


@dataclass(frozen=True)
class BreakEven:
    """From how many models on a strategy is significantly faster than the reference."""

    line: Line
    num_models: int | None  # None: at no N
    largest: int  # the largest N that was measured
    inconclusive: tuple[int, ...] = ()  # the N without a conclusive row


def by_line(results: Sequence[Summary]) -> dict[Line, list[Summary]]:
    """The rows of each line, ordered by N, without the reference and the self-check."""
    found: dict[Line, list[Summary]] = {}
    for row in results:
        if not row.case.is_reference and not row.case.is_self_check:
            found.setdefault(row.case.line, []).append(row)
    return {line: sorted(rows, key=lambda row: row.case.num_models) for line, rows in found.items()}


def by_grid_point(results: Sequence[Summary]) -> dict[GridPoint, list[Summary]]:
    """The rows of each grid point, in their order."""
    rows_of: dict[GridPoint, list[Summary]] = {}
    for row in results:
        rows_of.setdefault(row.case.grid_point, []).append(row)
    return rows_of


def break_even(rows: Sequence[Summary]) -> BreakEven:
    """The smallest N at which, and at every larger N measured, a strategy is significantly faster.

    If a line crosses 1 several times, the last crossing counts. An inconclusive N (too noisy,
    failed) is skipped and reported.

    Args:
        rows: one line, ordered by N.
    """
    start = None
    conclusive = [row for row in rows if row.speedup_interval is not None and not row.inconclusive]
    for row in reversed(conclusive):
        if not is_significantly_faster(row):
            break
        start = row.case.num_models
    inconclusive = tuple(row.case.num_models for row in rows if row not in conclusive)
    return BreakEven(rows[0].case.line, start, rows[-1].case.num_models, inconclusive)


def is_significantly_faster(row: Summary) -> bool:
    """Is the whole confidence interval of a conclusive speedup above 1?"""
    interval = row.speedup_interval
    return interval is not None and not row.inconclusive and interval[0] > 1


@dataclass(frozen=True)
class Leaders:
    """The fastest row of a grid point, and the rows that are not significantly slower: a tie.

    `speedup` is the geometric mean of the rows, and `interval` contains the interval of each. The
    maximum of several equal rows would be too high, and its own interval would miss the truth too
    often (the winner's curse).
    """

    rows: tuple[Summary, ...]  # the fastest first
    speedup: float
    interval: tuple[float, float]

    @property
    def is_faster(self) -> bool:
        """Are all of them significantly faster than the reference?"""
        return self.interval[0] > 1

    @property
    def is_slower(self) -> bool:
        return self.interval[1] < 1


def leaders(rows: Sequence[Summary]) -> Leaders | None:
    """The leaders among the conclusive rows besides the reference; None without any.

    Rows are compared by Welch's t-test over their processes, all of them with the fastest at level
    `CONFIDENCE` (Bonferroni correction).
    """
    found = [(row, row.log_speedup) for row in rows if not _is_baseline(row)]
    conclusive = [(row, log) for row, log in found if log is not None]
    if not conclusive:
        return None
    fastest, log = max(conclusive, key=lambda both: both[0].speedup or 0.0)
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(conclusive) - 1)
    tied = [
        row
        for row, other in conclusive
        if row is fastest or log.over(other).interval(confidence)[0] <= 1
    ]
    ordered = sorted(tied, key=lambda row: -(row.speedup or 0.0))
    intervals = [row.speedup_interval for row in tied if row.speedup_interval]
    return Leaders(
        tuple(ordered),
        geometric_mean(row.speedup or 1.0 for row in tied),
        (min(low for low, _ in intervals), max(high for _, high in intervals)),
    )


def _is_baseline(row: Summary) -> bool:
    return row.case.is_reference or row.case.is_self_check


def disordered(rows: Sequence[Summary]) -> list[tuple[Summary, Summary]]:
    """Pairs of rows of which the first has the larger speedup, but longer calls, either beyond the
    intervals: the reference was faster in the pairs of the second."""
    timed = [
        (row, row.speedup_interval, row.log_time.interval())
        for row in rows
        if not _is_baseline(row) and not row.inconclusive and row.log_time
    ]
    return [
        (row, other)
        for row, speedup, time_s in timed
        for other, other_speedup, other_time_s in timed
        if speedup and other_speedup
        if speedup[0] > other_speedup[1] and time_s[0] > other_time_s[1]
    ]


def break_even_calls(row: Summary, reference: Summary) -> float | None:
    """The number of calls after which a strategy has amortized its build and first call.

    The reference has a build and first call too. None unless the strategy is significantly faster.
    """
    startup_times = [row.build_s, row.first_call_s, reference.build_s, reference.first_call_s]
    call, reference_call = row.median_s, row.reference_median_s
    if (
        None in startup_times
        or call is None
        or reference_call is None
        or not is_significantly_faster(row)
    ):
        return None
    build, first, reference_build, reference_first = (float(value or 0) for value in startup_times)
    return max(0.0, (build + first - reference_build - reference_first) / (reference_call - call))


def extra_memory(row: Summary, reference: Summary) -> int | None:
    """Peak memory of a strategy beyond that of the reference, in bytes."""
    if row.peak_memory_bytes is None or reference.peak_memory_bytes is None:
        return None
    return row.peak_memory_bytes - reference.peak_memory_bytes
