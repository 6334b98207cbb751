"""Results -> pictures: time and speedup against N, and a heat map of a grid. No torch."""

import io
from collections.abc import Callable, Sequence
from itertools import combinations, cycle
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

# A palette for color-blind readers; markers and dashes keep lines distinct in grayscale. Source:
# Okabe and Ito, Color Universal Design (2008). Black is the reference.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
LABEL_GAP = 0.055  # minimum distance of two labels, as a share of the panel height
LABEL_WIDTH = 0.2  # labels closer than this, as a share of the panel width, may overlap
STYLE: Any = {"svg.hashsalt": "ensemble", "font.size": 10, "axes.spines.top": False}
DPI = 150
MIN_COLOR_SCALE = 1.25  # of the heat map, so that noise does not look like a difference
WRAP = 52  # characters per line of text in a panel

PanelKey = tuple[str, int, int]  # dtype, batch, px: one column of panels


def save(results: Sequence[Summary], path: Path, grid: Path) -> None:
    """Draw to `path`, and the heat map of a grid to `grid`."""
    write(lambda: draw(results), path)
    if is_grid(results):
        write(lambda: draw_grid(results), grid)


def write(picture: Callable[[], Figure], path: Path) -> None:
    """Draw a picture in the common style, and write it atomically."""
    with mpl.rc_context(STYLE):
        write_atomically(path, _render(picture(), path))


def is_grid(results: Sequence[Summary]) -> bool:
    """Do the results vary in N and in batch or image size?"""
    points = [row.case.grid_point for row in results]
    return len({point[0] for point in points}) > 1 and len({point[1:] for point in points}) > 1


def draw(results: Sequence[Summary]) -> Figure:
    """Two rows of panels, time above and speedup below; a column per dtype, batch and image size.

    A line is a strategy. Its band is the interquartile range of the times, or the confidence
    interval of the speedup, with a dot per process. Inconclusive and failed rows have no speedup; a
    panel without any states the reasons. A single N is drawn as bars: see `_draw_bars`.
    """
    timed = [row for row in results if row.times_s and not row.case.is_self_check]
    panel_keys = list(dict.fromkeys(_panel_key(row) for row in timed if not row.case.is_reference))
    panel_keys = (
        panel_keys or list(dict.fromkeys(_panel_key(row) for row in timed)) or [("float32", 1, 0)]
    )
    names = list(dict.fromkeys(row.case.strategy for row in timed if not row.case.is_reference))
    looks = dict(zip(names, zip(cycle(COLORS), cycle(MARKS), cycle(DASHES)), strict=False))
    if len({row.case.num_models for row in timed}) == 1:
        return _draw_bars(results, timed, panel_keys)
    figure = Figure(figsize=(5.2 * len(panel_keys) + 0.6, 7.6), layout="constrained")
    panels = figure.subplots(2, len(panel_keys), squeeze=False, sharex="col")
    for column, key in enumerate(panel_keys):
        above, below = panels[0][column], panels[1][column]
        dtype, batch, px = key
        above.set_title(f"{dtype}, batch {batch}, {px} px", fontsize=10)
        reference = [
            row for row in timed if row.case.is_reference and row.case.grid_point[1:] == key[1:]
        ]
        _draw_strategy(above, reference, "loop (reference)", ("black", "o", "-"), speedup=False)
        below.axhline(1, color="black", linewidth=1)
        for strategy in names:
            rows = [
                row for row in timed if row.case.strategy == strategy and _panel_key(row) == key
            ]
            rows = [row for row in rows if not row.case.is_reference]
            _draw_strategy(above, rows, strategy, looks[strategy], speedup=False)
            _draw_strategy(below, rows, strategy, looks[strategy], speedup=True)
        counts = sorted({row.case.num_models for row in timed if _panel_key(row)[1:] == key[1:]})
        _finish(above, counts, "time per call (ms)")
        _finish(below, counts, f"speedup over the loop ({CONFIDENCE:.0%} interval)")
        if not below.lines[1:]:
            here = [row for row in results if _panel_key(row) == key and not row.case.is_reference]
            _explain_empty_panel(below, here)
        below.set_xlabel("number of models")
    return figure


def _draw_bars(
    results: Sequence[Summary], timed: Sequence[Summary], panel_keys: Sequence[PanelKey]
) -> Figure:
    """Time on the left and speedup on the right, a bar per strategy; a row of panels per dtype,
    batch and image size. Whiskers are quartiles and confidence intervals."""
    groups = [
        [row for row in timed if row.case.is_reference and row.case.grid_point[1:] == key[1:]]
        + [row for row in timed if not row.case.is_reference and _panel_key(row) == key]
        for key in panel_keys
    ]
    heights = [len(rows) + 2 for rows in groups]
    figure = Figure(figsize=(10.4, 0.36 * sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(
        *(len(groups), 2), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for (left, right), rows, key in zip(panels, groups, panel_keys, strict=True):
        dtype, batch, px = key
        count = rows[0].case.num_models
        left.set_title(f"N = {count}, {dtype}, batch {batch}, {px} px", fontsize=10, loc="left")
        times = [(row.median_s, *_quartiles(row)) for row in rows]
        in_ms = [[1e3 * (value or 0.0) for value in one] for one in times]
        _bars(left, in_ms, rows, "time per call (ms)", "{:.3g}")
        shown = [
            [row.speedup or 0.0, *row.speedup_interval]
            if row.speedup_interval and not row.inconclusive
            else None
            for row in rows
        ]
        _bars(right, shown, rows, f"speedup over the loop ({CONFIDENCE:.0%} interval)", "{:.2f}")
        right.axvline(1, color="black", linewidth=1)
        if not any(shown):
            here = [row for row in results if _panel_key(row) == key and not row.case.is_reference]
            _explain_empty_panel(right, here)
    return figure


def _bars(
    axes: Axes,
    values: Sequence[Sequence[float] | None],
    rows: Sequence[Summary],
    what: str,
    text: str,
) -> None:
    """A horizontal bar of (value, low, high) per row, from the top; none where it is None."""
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        middle, low, high = value
        color = "black" if row.case.is_reference else COLORS[(place - 1) % len(COLORS)]
        whiskers = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.barh(place, middle, color=color, alpha=0.75, xerr=whiskers, ecolor="dimgray")
        axes.annotate(
            text.format(middle),
            (max(middle, high), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )
    names = ["loop (reference)" if row.case.is_reference else row.name for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_xlabel(what, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines["right"].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)


def draw_grid(results: Sequence[Summary]) -> Figure:
    """A heat map: the fastest strategy and its speedup by N, batch and image size.

    It is not named unless it is significantly faster.
    """
    points = sweep.by_grid_point([row for row in results if not row.case.is_self_check])
    counts = sorted({point[0] for point in points})
    sizes = sorted({point[1:] for point in points})
    figure = Figure(
        figsize=(1.5 * len(counts) + 2.6, 0.75 * len(sizes) + 1.8), layout="constrained"
    )
    axes = figure.subplots()
    best = {point: _fastest(rows) for point, rows in points.items()}
    values = [
        [
            (found[0].speedup or float("nan")) if (found := best.get((n, *size))) else float("nan")
            for n in counts
        ]
        for size in sizes
    ]
    image: Any = axes.imshow(
        values,
        cmap=mpl.colormaps["cividis"].with_extremes(bad="white"),
        aspect="auto",
        vmin=1,
        vmax=max([MIN_COLOR_SCALE, *(value for row in values for value in row if value == value)]),
    )
    for y, size in enumerate(sizes):
        for x, count in enumerate(counts):
            row, winner = best.get((count, *size)) or (None, "")
            text = f"{row.speedup:.2f}\n{winner}" if row else "incon-\nclusive"
            if row is not None and row.case.dtype != "float32":
                text += f"\n{row.case.dtype}"
            dark = row is not None and image.norm(row.speedup) < 0.5
            axes.text(
                x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(sizes)), [f"batch {batch}, {px} px" for batch, px in sizes])
    axes.set_xlabel("number of models")
    axes.set_title("speedup of the fastest strategy over the loop", fontsize=10)
    axes.spines[:].set_visible(False)
    return figure


def _fastest(rows: Sequence[Summary]) -> tuple[Summary, str] | None:
    """The fastest row, the reference included, and its label; None where no other is conclusive."""
    lead = sweep.leaders(rows)
    if lead is None:
        return None
    references = [row for row in rows if row.case.is_reference]
    row = max([*references, lead.rows[0]], key=lambda row: row.speedup or 0.0)
    is_tie = len(lead.rows) > 1 and row is lead.rows[0] and lead.is_faster
    return row, f"{_winner(row)} (tie)" if is_tie else _winner(row)


def _winner(row: Summary) -> str:
    named = row.case.is_reference or sweep.is_significantly_faster(row)
    return row.case.strategy if named else "no winner"


def _panel_key(row: Summary) -> PanelKey:
    return row.case.dtype, row.case.batch_size, row.case.image_size


def _draw_strategy(
    axes: Axes, rows: Sequence[Summary], label: str, look: tuple[str, str, str], *, speedup: bool
) -> None:
    """One strategy with its band; `_finish` labels it."""
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
    color, mark, dash = look
    axes.fill_between(counts, low, high, color=color, alpha=0.2, linewidth=0)
    axes.vlines(
        counts, low, high, color=color, alpha=0.6, linewidth=1
    )  # the whole band if there is only one N
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=color, markersize=3, alpha=0.7)
    axes.plot(
        counts, middle, dash, color=color, marker=mark, markersize=5, linewidth=1.6, label=label
    )


def _explain_empty_panel(axes: Axes, rows: Sequence[Summary]) -> None:
    """State in an empty panel why its rows have no speedup."""
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
    """Log axes with plain numbers, and a label at the end of each line."""
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
    """Label each line at its end, in its color, without overlaps."""
    lines: list[Any] = [
        line for line in axes.get_lines() if not str(line.get_label()).startswith("_")
    ]
    xs = [float(line.get_xydata()[-1][0]) for line in lines]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform(line.get_xydata()[-1]) for line in lines]
    heights = _separate([(float(x), float(y)) for x, y in ends])
    for line, x, height in zip(lines, xs, heights, strict=True):
        axes.annotate(
            str(line.get_label()),
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=line.get_color(),
        )


def _digits(low: float, high: float) -> Callable[[float, object], str]:
    """Formatter of the minor ticks, by the range of the axis."""
    if high / low <= 2:
        return lambda value, _: f"{value:g}"
    return _some_digits if high / low > 8 else _all_below_one


def _some_digits(value: float, _: object) -> str:
    """Label 2, 3, 5 and 7 of each decade."""
    text = f"{value:g}"
    return text if text.strip("0.")[0] in "2357" else ""


def _all_below_one(value: float, position: object) -> str:
    """As above, but label every value below 1, where a slowdown of 10 % matters."""
    return f"{value:g}" if value < 1 else _some_digits(value, position)


def _separate(points: Sequence[tuple[float, float]]) -> list[float]:
    """The heights of labels, moved apart by at least `LABEL_GAP` where their widths may overlap."""
    heights = [height for _, height in points]
    order = sorted(range(len(points)), key=heights.__getitem__)
    close = [
        (lower, upper)
        for lower, upper in combinations(order, 2)
        if abs(points[lower][0] - points[upper][0]) < LABEL_WIDTH
    ]
    for _ in range(200):
        moved = False
        for lower, upper in close:
            lack = LABEL_GAP - (heights[upper] - heights[lower])
            if lack > 1e-9:
                heights[lower] -= lack / 2
                heights[upper] += lack / 2
                moved = True
        if not moved:
            break
    return heights


def _render(figure: Figure, path: Path) -> bytes:
    content = io.BytesIO()
    form = path.suffix.lower().removeprefix(".")
    metadata = {"Description": MARK} | ({"Date": None} if form == "svg" else {})
    figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
    return content.getvalue()
