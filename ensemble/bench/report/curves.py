"""Latency against the offered rate: each strategy's curve, and where another becomes the soonest.

Pure functions, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.bench.load.record import LoadRun
from ensemble.bench.summary import Summary
from ensemble.statistics import median

STEPS = 200  # between the least and the highest rate, where the curves are compared
CLEARLY = 0.05  # so much sooner must another be, as a share


@dataclass(frozen=True)
class Part:
    """From this rate on this strategy answers soonest."""

    from_qps: float
    strategy: str


def held_qps(row: Summary) -> float | None:
    """The sustained rate of a row, in requests per second."""
    return row.load.held_qps if row.load else None


def shown(row: Summary) -> LoadRun | None:
    """The run of LoadGen that a row shows."""
    return row.load.shown if row.load else None


def curve(row: Summary, field: str) -> list[tuple[float, float]]:
    """(offered rate, latency in s) of a server's runs, the median where a rate was played again."""
    runs = row.load.runs if row.load is not None and row.load.scenario == "server" else ()
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        value = getattr(run, field)
        if value is not None and run.offered_qps is not None:
            by_rate.setdefault(run.offered_qps, []).append(value)
    return [(rate, median(by_rate[rate]) or 0.0) for rate in sorted(by_rate)]


def changes(rows: Sequence[Summary]) -> list[Part]:
    """Who answers soonest at each rate, by the curves of the percentile that was asked for.

    A strategy counts up to the rate that it holds; below its least rate its curve goes on level.
    """
    lines = {
        row.case.strategy: (points, held)
        for row in rows
        if (held := held_qps(row)) is not None
        and row.status == "ok"
        and (points := curve(row, "tail_s"))
    }
    if not lines:
        return []
    least = min(points[0][0] for points, _ in lines.values())
    most = max(held for _, held in lines.values())
    parts: list[Part] = []
    for rate in np.linspace(least, most, STEPS):
        tails = {
            name: float(np.interp(rate, *np.transpose(points)))
            for name, (points, held) in lines.items()
            if rate <= held * (1 + 1e-9)
        }
        soonest = min(tails, key=tails.__getitem__)
        now = parts[-1].strategy if parts else None
        if now in tails and tails[soonest] > (1 - CLEARLY) * tails[now]:
            continue
        if soonest != now:
            parts.append(Part(float(rate), soonest))
    return parts
