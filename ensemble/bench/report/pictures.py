"""Results -> pictures: time and speedup against N, and the grid as a heat map. No torch."""

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ensemble.bench.report import sweep
from ensemble.bench.report.exports import MARK
from ensemble.bench.summary import Summary
from ensemble.files import write_atomically
from ensemble.statistics import CONFIDENCE

# Okabe and Ito's colours, told apart by colour-blind people too; marks and dashes tell them apart
# in grey. Source: Okabe and Ito, Color Universal Design (2008). Black is the reference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
LABEL_GAP = 0.055  # between two labels, of the height of a panel
STYLE: Any = {"svg.hashsalt": "ensemble", "font.size": 10, "axes.spines.top": False}
DPI = 150
LEAST_SCALE = 1.25  # of the heat map's colours: a difference of noise looks like none
WRAP = 52  # characters of a sentence in a panel

Place = tuple[str, int, int]  # dtype, batch, px: one column of panels


def save(results: Sequence[Summary], path: Path, grid: Path) -> None:
    """Draw to `path`; where the results are a grid, its heat map to `grid`."""
    write(lambda: draw(results), path)
    if is_grid(results):
        write(lambda: draw_grid(results), grid)


def write(picture: Callable[[], Figure], path: Path) -> None:
    """Draw a picture in the style of all of them, and write it whole."""
    with mpl.rc_context(STYLE):
        write_atomically(path, _render(picture(), path))


def is_grid(results: Sequence[Summary]) -> bool:
    """Do the results vary in N and in batch or image size?"""
    cells = [row.case.cell for row in results]
    return len({cell[0] for cell in cells}) > 1 and len({cell[1:] for cell in cells}) > 1


def draw(results: Sequence[Summary]) -> Figure:
    """Two rows of panels, time above and speedup below; a column a dtype, batch and image size.

    A line is a strategy; its band is the inter-quartile range of the times, below it the interval
    of the speedup, with a dot for each process. What cannot be claimed (failed, too noisy, too few
    pairs) is left out below; where that is all, the panel says why.
    """
    timed = [row for row in results if row.times_s and not row.case.is_self_check]
    places = list(dict.fromkeys(_place(row) for row in timed if not row.case.is_reference))
    places = places or list(dict.fromkeys(_place(row) for row in timed)) or [("float32", 1, 0)]
    names = list(dict.fromkeys(row.case.strategy for row in timed if not row.case.is_reference))
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(MARKS), cycle(DASHES)), strict=False))
    figure = Figure(figsize=(5.2 * len(places) + 0.6, 7.6), layout="constrained")
    panels = figure.subplots(2, len(places), squeeze=False, sharex="col")
    for column, place in enumerate(places):
        above, below = panels[0][column], panels[1][column]
        dtype, batch, px = place
        above.set_title(f"{dtype}, batch {batch}, {px} px", fontsize=10)
        reference = [
            row for row in timed if row.case.is_reference and row.case.cell[1:] == place[1:]
        ]
        _line(above, reference, "loop (reference)", ("black", "o", "-"), speedup=False)
        below.axhline(1, color="black", linewidth=1)
        for strategy in names:
            rows = [row for row in timed if row.case.strategy == strategy and _place(row) == place]
            rows = [row for row in rows if not row.case.is_reference]
            _line(above, rows, strategy, looks[strategy], speedup=False)
            _line(below, rows, strategy, looks[strategy], speedup=True)
        counts = sorted({row.case.num_models for row in timed if _place(row)[1:] == place[1:]})
        _finish(above, counts, "time per call (ms)")
        _finish(below, counts, f"speedup over the loop ({CONFIDENCE:.0%} interval)")
        if not below.lines[1:]:
            here = [row for row in results if _place(row) == place and not row.case.is_reference]
            _say_why_empty(below, here)
        below.set_xlabel("number of models")
    return figure


def draw_grid(results: Sequence[Summary]) -> Figure:
    """The speedup of the fastest strategy of each cell, N across, batch and image size down.

    Where its interval holds 1 there is no winner, and its name is not shown.
    """
    cells = sweep.cells([row for row in results if not row.case.is_self_check])
    counts = sorted({cell[0] for cell in cells})
    places = sorted({cell[1:] for cell in cells})
    figure = Figure(
        figsize=(1.5 * len(counts) + 2.6, 0.75 * len(places) + 1.8), layout="constrained"
    )
    axes = figure.subplots()
    best = {cell: sweep.fastest(rows) for cell, rows in cells.items()}
    values = [
        [
            (row.speedup or float("nan")) if (row := best.get((n, *place))) else float("nan")
            for n in counts
        ]
        for place in places
    ]
    image: Any = axes.imshow(
        values,
        cmap=mpl.colormaps["cividis"].with_extremes(bad="white"),
        aspect="auto",
        vmin=1,
        vmax=max([LEAST_SCALE, *(value for row in values for value in row if value == value)]),
    )
    for y, place in enumerate(places):
        for x, count in enumerate(counts):
            row = best.get((count, *place))
            text = f"{row.speedup:.2f}\n{_winner(row)}" if row else "not\nsure"
            if row is not None and row.case.dtype != "float32":
                text += f"\n{row.case.dtype}"
            dark = row is not None and image.norm(row.speedup) < 0.5
            axes.text(
                x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(places)), [f"batch {batch}, {px} px" for batch, px in places])
    axes.set_xlabel("number of models")
    axes.set_title("speedup of the fastest strategy over the loop", fontsize=10)
    axes.spines[:].set_visible(False)
    return figure


def _winner(row: Summary) -> str:
    is_sure = row.case.is_reference or sweep.surely_faster(row)
    return row.case.strategy if is_sure else "no winner"


def _place(row: Summary) -> Place:
    return row.case.dtype, row.case.batch_size, row.case.image_size


def _line(
    axes: Axes, rows: Sequence[Summary], label: str, look: tuple[str, str, str], *, speedup: bool
) -> None:
    """One strategy with its spread; its label is put at its end by `_finish`."""
    points, dots = [], []
    for row in sorted(rows, key=lambda row: row.case.num_models):
        if speedup and row.speedup_interval and not row.inconclusive:
            points.append((row.case.num_models, row.speedup, *row.speedup_interval))
            dots += [(row.case.num_models, value) for value in row.process_speedups]
        elif not speedup:
            points.append((row.case.num_models, row.median_s, *_quartiles(row)))
    if not points:
        return
    scale = 1 if speedup else 1e3
    counts = [point[0] for point in points]
    middle, low, high = ([(point[i] or 0) * scale for point in points] for i in (1, 2, 3))
    colour, mark, dash = look
    axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.vlines(counts, low, high, color=colour, alpha=0.6, linewidth=1)  # of one N the whole band
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=3, alpha=0.7)
    axes.plot(
        counts, middle, dash, color=colour, marker=mark, markersize=5, linewidth=1.6, label=label
    )


def _say_why_empty(axes: Axes, rows: Sequence[Summary]) -> None:
    """In an empty panel: why each of the rows that would be there is not."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.case.is_self_check:
            reason = row.inconclusive or (row.status if row.status != "ok" else "not compared")
            reasons.setdefault(reason, []).append(row.case.strategy)
    lines = [
        f"{reason}: {', '.join(dict.fromkeys(names))}" for reason, names in reasons.items()
    ] or ["nothing was compared with the loop"]
    axes.text(
        *(0.5, 0.75, fill("no speedup: " + "; ".join(lines), WRAP)),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=8,
        backgroundcolor="white",
    )


def _quartiles(row: Summary) -> tuple[float, float]:
    ordered = sorted(row.times_s)
    return ordered[len(ordered) // 4], ordered[min(len(ordered) - 1, 3 * len(ordered) // 4)]


def _finish(axes: Axes, counts: Sequence[int], what: str) -> None:
    """Log axes with plain numbers, and each line's name at its end, in its colour."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel(what)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)
    if not counts:
        return
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_xlim(counts[0] * 0.93, counts[-1] * (counts[-1] / counts[0]) ** 0.04 * 1.05)
    axes.yaxis.set_minor_formatter(FuncFormatter(_digits(*axes.get_ylim())))
    label_ends(axes)


def label_ends(axes: Axes) -> None:
    """Each line's name beside its end, in its colour, none on another."""
    lines: list[Any] = [
        line for line in axes.get_lines() if not str(line.get_label()).startswith("_")
    ]
    ends = []
    for line in lines:
        x, y = line.get_xydata()[-1]
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        ends.append((float(height), line))
    placed = _spread([height for height, _ in sorted(ends, key=lambda end: end[0])])
    for height, (_, line) in zip(placed, sorted(ends, key=lambda end: end[0]), strict=True):
        axes.annotate(
            str(line.get_label()),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=line.get_color(),
        )


def _digits(low: float, high: float) -> Callable[[float, object], str]:
    """Which values between the powers of ten get a label, by how far the axis goes."""
    if high / low <= 2:
        return lambda value, _: f"{value:g}"
    return _some_digits if high / low > 8 else _all_below_one


def _some_digits(value: float, _: object) -> str:
    """Label 2, 3, 5 and 7 of each decade."""
    text = f"{value:g}"
    return text if text.strip("0.")[0] in "2357" else ""


def _all_below_one(value: float, position: object) -> str:
    """The same, but all below 1, where a loss of a tenth counts."""
    return f"{value:g}" if value < 1 else _some_digits(value, position)


def _spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved apart by at least `LABEL_GAP`, as little as that needs."""
    placed = list(heights)
    for _ in range(200):
        moved = False
        for index in range(len(placed) - 1):
            lack = LABEL_GAP - (placed[index + 1] - placed[index])
            if lack > 1e-9:
                placed[index] -= lack / 2
                placed[index + 1] += lack / 2
                moved = True
        if not moved:
            break
    return placed


def _render(figure: Figure, path: Path) -> bytes:
    content = io.BytesIO()
    form = path.suffix.lower().removeprefix(".")
    metadata = {"Description": MARK} | ({"Date": None} if form == "svg" else {})
    figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
    return content.getvalue()
