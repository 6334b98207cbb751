"""Latency against the offered rate: the curve of each strategy, and the lowest latency.

Pure functions, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.bench.load.record import LoadRun
from ensemble.bench.summary import Summary
from ensemble.statistics import median

CLOSE_RATES = 1.06  # two rates of less than this ratio count as one
STEPS = 200  # rates at which the curves are compared
MIN_IMPROVEMENT = 0.05  # relative, for another strategy to replace the one with lowest latency


@dataclass(frozen=True)
class Segment:
    """From this rate on this strategy has the lowest latency."""

    from_qps: float
    strategy: str


def sustained_qps(row: Summary) -> float | None:
    """The sustained rate of a row, in requests per second."""
    return row.load.sustained_qps if row.load else None


def reported_run(row: Summary) -> LoadRun | None:
    """The LoadGen run whose figures a row shows."""
    return row.load.reported_run if row.load else None


def server_runs(row: Summary) -> tuple[LoadRun, ...]:
    """The runs of the server scenario; none of another."""
    return row.load.runs if row.load is not None and row.load.scenario == "server" else ()


def latency_curve(row: Summary, field: str) -> list[tuple[float, float]]:
    """(offered rate, latency in s) by rate: the median over the runs at each rate."""
    by_rate: dict[float, list[float]] = {}
    for rate, latency, _ in _points(row, field):
        by_rate.setdefault(rate, []).append(latency)
    return [(rate, median(by_rate[rate]) or 0.0) for rate in sorted(by_rate)]


def sustained_curve(row: Summary, field: str) -> list[tuple[float, float]]:
    """As `latency_curve`, up to the sustained rate; empty if there is none.

    Rates closer than the search resolves count as one, the highest of them, so that run-to-run
    noise does not make the curve fall. A rate without a valid run is left out.
    """
    highest = sustained_qps(row)
    if highest is None:
        return []
    groups: list[list[tuple[float, float, bool]]] = []
    for point in sorted(_points(row, field), reverse=True):
        rate = point[0]
        if rate > highest * (1 + 1e-9):
            continue
        if groups and groups[-1][0][0] / rate < CLOSE_RATES:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        (group[0][0], median([latency for _, latency, _ in group]) or 0.0)
        for group in reversed(groups)
        if any(valid for _, _, valid in group)
    ]


def _points(row: Summary, field: str) -> list[tuple[float, float, bool]]:
    """(offered rate, latency in s, is the run valid, or within an estimated rate) of each run with
    a known latency."""
    return [
        (run.offered_qps, value, is_within(row, run))
        for run in server_runs(row)
        if (value := getattr(run, field)) is not None and run.offered_qps is not None
    ]


def is_within(row: Summary, run: LoadRun) -> bool:
    """Is a run valid, or one of a search at a rate that its estimate sustains?"""
    estimate = row.load.estimate if row.load else None
    searched = estimate is not None and run.purpose == "search"
    return run.valid or (
        searched and (run.offered_qps or 0.0) <= (sustained_qps(row) or 0.0) * (1 + 1e-9)
    )


def lowest_latency(rows: Sequence[Summary]) -> list[Segment]:
    """The strategy with the lowest latency percentile at each rate, as segments by rate.

    A strategy takes part up to its sustained rate; below its lowest rate its curve is extended
    horizontally.
    """
    curves = {
        row.case.strategy: (points, sustained)
        for row in rows
        if (sustained := sustained_qps(row)) is not None
        and row.status == "ok"
        and (points := latency_curve(row, "tail_s"))
    }
    if not curves:
        return []
    lowest = min(points[0][0] for points, _ in curves.values())
    highest = max(sustained for _, sustained in curves.values())
    segments: list[Segment] = []
    for rate in np.linspace(lowest, highest, STEPS):
        latencies = {
            strategy: float(np.interp(rate, *np.transpose(points)))
            for strategy, (points, sustained) in curves.items()
            if rate <= sustained * (1 + 1e-9)
        }
        best = min(latencies, key=latencies.__getitem__)
        current = segments[-1].strategy if segments else None
        if current in latencies and latencies[best] > (1 - MIN_IMPROVEMENT) * latencies[current]:
            continue
        if best != current:
            segments.append(Segment(float(rate), best))
    return segments
