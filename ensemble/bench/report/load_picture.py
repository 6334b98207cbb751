"""Results under load -> a picture: latency against the offered rate. Imports no torch."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ensemble.bench.report import sweep
from ensemble.bench.report.curves import curve, held_qps
from ensemble.bench.report.pictures import (
    COLOURS,
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
    """A column a cell: above the percentile that was asked for, below the median.

    A full mark is a run that the referee called valid, an empty one another; a vertical line is the
    rate that is held, a horizontal one the bound.
    """
    shown = [row for row in results if curve(row, "p50_s")]
    cells = list(sweep.cells(shown).items()) or [((0, 0, 0), [])]
    names = list(dict.fromkeys(row.case.strategy for row in shown if not row.case.is_reference))
    looks = dict(zip(names, zip(COLOURS, cycle(MARKS[1:]), cycle(DASHES[1:])), strict=False))
    figure = Figure(figsize=(5.6 * len(cells) + 0.6, 7.6), layout="constrained")
    panels = figure.subplots(2, len(cells), squeeze=False, sharex="col")
    for column, ((number, _, px), rows) in enumerate(cells):
        above, below = panels[0][column], panels[1][column]
        kind = "requests to all" if rows and rows[0].case.inputs == "shared" else "tenants, of"
        above.set_title(f"{kind} {number} models, {px} px", fontsize=10)
        for row in rows:
            look = BLACK if row.case.is_reference else looks[row.case.strategy]
            _line(above, row, "tail_s", look)
            _line(below, row, "p50_s", look)
        for bound_s in {row.load.bound_s for row in rows if row.load is not None}:
            _bound(above, bound_s)
        percentile = rows[0].load.percentile if rows and rows[0].load else 99.0
        _finish(above, f"{percentile:g} % answered within (ms)")
        _finish(below, "50 % answered within (ms)")
        below.set_xlabel("offered requests per second")
    return figure


def _line(axes: Axes, row: Summary, field: str, look: Look) -> None:
    """One strategy, at all rates that were played."""
    points = curve(row, field)
    if not points or row.load is None:
        return
    colour, mark, dash = look
    label = f"{row.case.strategy}" + (", bfloat16" if row.case.dtype == "bfloat16" else "")
    rates, values = zip(*((rate, 1e3 * seconds) for rate, seconds in points), strict=True)
    axes.plot(rates, values, dash, color=colour, linewidth=1.6, label=label)
    for run in row.load.runs:
        value = getattr(run, field)
        if value is not None and run.offered_qps is not None:
            face = colour if run.valid else "white"
            place = ([run.offered_qps], [1e3 * value])
            axes.plot(*place, mark, color=colour, markerfacecolor=face, markersize=5)
    held = held_qps(row)
    if held is not None:
        axes.axvline(held, color=colour, linewidth=0.8, linestyle=":", alpha=0.8)


def _bound(axes: Axes, bound_s: float | None) -> None:
    if bound_s is not None:
        axes.axhline(1e3 * bound_s, color="grey", linewidth=0.8)
        axes.annotate(
            "bound",
            (0.0, 1e3 * bound_s),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
            color="grey",
        )


def _finish(axes: Axes, what: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel(what)
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
    """Label those that begin with one of these digits."""
    text = f"{value:g}"
    return text if text.strip("0.")[:1] in tuple(digits) else ""
