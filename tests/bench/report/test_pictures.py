"""The values that the pictures draw."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from ensemble.bench.report import pictures
from ensemble.bench.summary import Summary
from tests.made import (
    LOOP,
    VMAP,
    at,
    changed,
    curve,
)

LOOPS = [changed(LOOP, num_models=n) for n in (1, 2, 4)]
ROWS = [*LOOPS, *curve(0.8, 1.2, 1.6), *(changed(r, strategy="jax") for r in curve(0.5, 0.5, 0.4))]


def near(value: float) -> Any:
    return pytest.approx(value)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    drawn: list[Any] = list(axes.get_lines())
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in drawn
        if not str(line.get_label()).startswith("_")
    }


def test_times_are_drawn_above_and_speedups_below() -> None:
    above, below = pictures.draw(ROWS).axes
    assert lines(above)["loop (reference)"] == [(1, near(100)), (2, near(100)), (4, near(100))]
    assert [x for x, _ in lines(above)["vmap"]] == [1, 2, 4]
    assert [y for _, y in lines(above)["vmap"]] == pytest.approx([125, 100 / 1.2, 62.5])
    assert [y for _, y in lines(below)["vmap"]] == pytest.approx([0.8, 1.2, 1.6])
    assert [y for _, y in lines(below)["jax"]] == pytest.approx([0.5, 0.5, 0.4])
    assert above.get_ylabel() == "time per call (ms)"
    assert below.get_xlabel() == "number of models"
    assert (below.get_xscale(), below.get_yscale(), above.get_yscale()) == ("log", "log", "log")
    assert list(below.get_xticks()) == [1, 2, 4]
    drawn: list[Any] = list(below.get_lines())
    assert any(list(line.get_ydata()) == [1, 1] for line in drawn)


def test_every_line_is_labeled_at_its_end_without_overlaps() -> None:
    above, _ = pictures.draw(ROWS).axes
    placed = {text.get_text(): text.xy[1] for text in above.texts}  # type: ignore[attr-defined]
    assert set(placed) == {"loop (reference)", "vmap", "jax"}
    heights = sorted(placed.values())
    gaps = [b - a for a, b in pairwise(heights)]
    assert min(gaps) >= pictures.LABEL_GAP - 1e-6
    assert above.get_legend() is None


def test_lines_are_distinct_in_grayscale() -> None:
    names = [changed(at(2, 1.0), strategy=f"s{index}") for index in range(9)]
    _, below = pictures.draw([LOOP, *names]).axes
    looks = {
        (line.get_marker(), line.get_linestyle())
        for line in below.get_lines()
        if str(line.get_label()).startswith("s")
    }
    assert len(looks) == 9


@pytest.mark.parametrize("low", [0.1, 0.11, 0.013])
def test_an_axis_with_a_small_range_has_tick_labels(low: float) -> None:
    rows = [changed(LOOP, times_s=(low,) * 20), changed(at(2, 1.0), times_s=(1.4 * low,) * 20)]
    figure = pictures.draw(rows)
    figure.draw_without_rendering()
    (bottom, top), axis = figure.axes[0].get_ylim(), figure.axes[0].yaxis
    numbers = [
        label.get_text()
        for label in (*axis.get_ticklabels(minor=True), *axis.get_ticklabels())
        if bottom <= label.get_position()[1] <= top and label.get_text()
    ]
    assert len(numbers) >= 2


def test_the_interval_of_a_single_n_is_drawn_as_well() -> None:
    _, below = pictures.draw([LOOP, at(2, 1.5)]).axes
    (bar,) = (c for c in below.collections if isinstance(c, LineCollection))
    (segment,) = bar.get_segments()
    interval = at(2, 1.5).speedup_interval
    assert interval is not None
    assert segment[:, 1] == pytest.approx(interval)


def test_a_single_n_is_drawn_as_bars_with_their_intervals() -> None:
    times, speedups = pictures.draw([LOOP, VMAP, changed(VMAP, strategy="jax")]).axes
    widths = [[bar.get_width() for bar in axes.patches] for axes in (times, speedups)]  # type: ignore[attr-defined]
    assert widths == [pytest.approx([100, 50, 50]), pytest.approx([2, 2])]
    names = [label.get_text() for label in times.get_yticklabels()]
    assert names == ["loop (reference)", "vmap", "jax"]
    assert [text.get_text() for text in speedups.texts] == ["2.00", "2.00"]


def test_inconclusive_rows_are_not_drawn_as_a_speedup() -> None:
    noisy = changed(at(2, 2.0), times_s=(0.03, 0.06) * 10)
    failed = changed(at(4, 2.0), status="failed", error="broke")
    _, below = pictures.draw([*LOOPS, at(1, 1.5), noisy, failed]).axes
    assert lines(below)["vmap"] == [(1, near(1.5))]


def test_a_panel_without_a_speedup_states_the_reasons() -> None:
    busy = changed(ROWS[3], others_cpu_share=0.5)
    failed = changed(ROWS[3], strategy="jax", status="failed", error="broke")
    _, below = pictures.draw([LOOPS[0], busy, failed]).axes
    (text,) = (text.get_text().replace("\n", " ") for text in below.texts)
    assert text == "no speedup: CPU busy: vmap; failed: jax"
    (alone,) = pictures.draw([LOOPS[0]]).axes[1].texts
    assert "nothing was compared with the loop" in alone.get_text()
    assert not any("no speedup" in text.get_text() for text in pictures.draw(ROWS).axes[1].texts)


def test_a_grid_has_a_column_per_size_and_a_heat_map_of_the_fastest() -> None:
    small = [changed(row, image_size=64) for row in ROWS]
    assert len(pictures.draw([*ROWS, *small]).axes) == 4
    axes = pictures.draw_grid([*ROWS, *small]).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.00\nloop", "1.20\nvmap", "1.60\nvmap"] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "batch 1, 64 px",
        "batch 1, 224 px",
    ]


def test_a_heat_map_marks_a_winner_that_others_tie_with() -> None:
    rows = [changed(row, strategy="jax") for row in ROWS if not row.case.is_reference]
    (axes, *_) = pictures.draw_grid([*ROWS, *rows]).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.00\nloop", "1.20\nvmap (tie)", "1.60\nvmap (tie)"]


def test_a_heat_map_names_no_winner_if_the_interval_contains_1() -> None:
    noisy = [changed(row, times_s=(0.0999, 0.1001) * 10) for row in curve(1.0, 1.0, 1.0)]
    (axes, *_) = pictures.draw_grid([*LOOPS, *noisy]).axes
    texts = {text.get_text() for text in axes.texts}
    assert "vmap" not in "".join(texts)
    assert axes.images[0].get_clim() == (1, pictures.MIN_COLOR_SCALE)


@pytest.mark.parametrize("rows", [[], [LOOP], ROWS[:1], [changed(LOOP, times_s=())]])
def test_an_almost_empty_run_is_drawn(rows: list[Summary], tmp_path: Path) -> None:
    pictures.save(rows, tmp_path / "p.png", tmp_path / "p_grid.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "p_grid.png").exists()


def test_the_same_results_give_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        pictures.save(ROWS, tmp_path / name, tmp_path / "grid.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
