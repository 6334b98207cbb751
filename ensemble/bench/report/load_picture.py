"""Load tests -> a picture: latency against the offered rate. Imports no torch."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ensemble.bench.load.record import sustained_interval
from ensemble.bench.report import sweep
from ensemble.bench.report.curves import (
    is_within,
    latency_curve,
    server_runs,
    sustained_curve,
    sustained_qps,
)
from ensemble.bench.report.pictures import (
    COLORS,
    DASHES,
    MARKS,
    label_ends,
    write,
)
from ensemble.bench.summary import Summary

Look = tuple[str, str, str]
BLACK: Look = ("black", "o", "-")


def save(results: Sequence[Summary], path: Path) -> None:
    """Draw to `path`."""
    write(lambda: draw(results), path)


def draw(results: Sequence[Summary]) -> Figure:
    """A column per grid point: the requested latency percentile above, the median below.

    A curve is a strategy, through the median of each rate up to the sustained one. A filled marker
    is a valid run, or one below the sustained rate. A dotted vertical line is that rate, in a band
    that is its confidence interval; a horizontal line is the latency bound.
    """
    drawable = [row for row in results if latency_curve(row, "p50_s")]
    grid_points = list(sweep.by_grid_point(drawable).items()) or [((0, 0, 0), [])]
    names = list(dict.fromkeys(row.case.strategy for row in drawable if not row.case.is_reference))
    looks = dict(zip(names, zip(COLORS, cycle(MARKS[1:]), cycle(DASHES[1:])), strict=False))
    figure = Figure(figsize=(5.6 * len(grid_points) + 0.6, 7.6), layout="constrained")
    panels = figure.subplots(2, len(grid_points), squeeze=False, sharex="col")
    for column, ((num_models, _, px), rows) in enumerate(grid_points):
        above, below = panels[0][column], panels[1][column]
        is_ensemble = bool(rows) and rows[0].case.inputs == "shared"
        kind = f"ensemble of {num_models} models" if is_ensemble else f"{num_models} tenants"
        above.set_title(f"{kind}, {px} px", fontsize=10)
        for row in rows:
            look = BLACK if row.case.is_reference else looks[row.case.strategy]
            _draw_strategy(above, row, "tail_s", look)
            _draw_strategy(below, row, "p50_s", look)
        for bound_s in {row.load.bound_s for row in rows if row.load is not None}:
            _draw_bound(above, bound_s)
        percentile = rows[0].load.percentile if rows and rows[0].load else 99.0
        _finish(above, f"p{percentile:g} latency (ms)")
        _finish(below, "p50 latency (ms)")
        below.set_xlabel("offered requests per second")
    return figure


def _draw_strategy(axes: Axes, row: Summary, field: str, look: Look) -> None:
    """The curve of one strategy, and a marker per run."""
    color, mark, dash = look
    label = f"{row.case.strategy}" + ("" if row.case.dtype == "float32" else f", {row.case.dtype}")
    points = sustained_curve(row, field)
    if not points:  # nothing to connect: label the highest rate
        points, dash = latency_curve(row, field)[-1:], ""
    if not points:
        return
    rates, values = zip(*((rate, 1e3 * seconds) for rate, seconds in points), strict=True)
    axes.plot(rates, values, dash, color=color, linewidth=1.6, label=label)
    for run in server_runs(row):
        value = getattr(run, field)
        if value is not None and run.offered_qps is not None:
            face = color if is_within(row, run) else "white"
            point = ([run.offered_qps], [1e3 * value])
            axes.plot(*point, mark, color=color, markerfacecolor=face, markersize=5)
    sustained = sustained_qps(row)
    interval = sustained_interval(row.load_tests)
    if sustained is not None:
        axes.axvline(sustained, color=color, linewidth=0.8, linestyle=":", alpha=0.8)
    if interval is not None:
        axes.axvspan(*interval, color=color, alpha=0.12, linewidth=0)


def _draw_bound(axes: Axes, bound_s: float | None) -> None:
    if bound_s is not None:
        axes.axhline(1e3 * bound_s, color="gray", linewidth=0.8)
        axes.annotate(
            "bound",
            (0.0, 1e3 * bound_s),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
            color="gray",
        )


def _finish(axes: Axes, label: str) -> None:
    """Log axes with plain numbers, and each strategy's name at the end of its curve."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.spines["right"].set_visible(False)
    axes.grid(which="both", linewidth=0.4, alpha=0.4)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        digits = "2357" if high < 100 * low else "25"
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(partial(_some_digits, digits)))
    axes.tick_params(which="both", labelsize=8)
    if axes.get_lines():
        label_ends(axes)


def _some_digits(digits: str, value: float, _: object) -> str:
    """Label the values with one of these leading digits."""
    text = f"{value:g}"
    return text if text.strip("0.")[:1] in tuple(digits) else ""
