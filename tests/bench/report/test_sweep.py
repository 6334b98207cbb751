"""The break-even of a strategy, and its cost."""

import pytest

from ensemble.bench.report import sweep
from ensemble.bench.report.sweep import (
    BreakEven,
    break_even,
    break_even_calls,
    extra_memory,
    fastest,
)
from ensemble.bench.report.verdict import render_answer
from tests.made import (
    LOOP,
    VMAP,
    at,
    changed,
    curve,
)

LINE = ("vmap", "float32", 1, 224)


@pytest.mark.parametrize(
    ("speedups", "start"),
    [
        ((0.8, 0.9, 1.0, 0.99), None),  # never
        ((0.8, 0.9, 1.1, 1.3), 4),  # one crossing
        ((1.2, 1.3, 1.4, 1.5), 1),  # from the first on
        ((1.2, 0.9, 1.1, 1.3), 4),  # two crossings: the last one counts
        ((0.8, 1.2, 1.3, 0.9), None),  # faster, then slower again
    ],
)
def test_the_break_even_is_the_last_crossing_to_faster(
    speedups: tuple[float, ...], start: int | None
) -> None:
    assert break_even(curve(*speedups)) == BreakEven(LINE, start, 8)


def test_an_interval_that_contains_1_is_not_significantly_faster() -> None:
    level = changed(at(4, 1.1), times_s=(0.095, 0.105) * 10)
    assert not sweep.is_significantly_faster(level)
    assert break_even([at(2, 1.5), level, at(8, 1.5)]).num_models == 8


def test_noisy_failed_and_short_rows_are_inconclusive() -> None:
    noisy = changed(at(4, 2.0), times_s=(0.03, 0.06) * 10)
    failed = changed(at(4, 2.0), status="failed", error="broke")
    short = changed(at(4, 2.0), times_s=(0.05,) * 5, reference_times_s=(0.1,) * 5)
    assert not any(map(sweep.is_significantly_faster, (noisy, failed, short)))
    assert fastest([LOOP, noisy, failed]) is None
    ends_noisy = [at(1, 1.5), at(2, 1.5), changed(noisy, num_models=8)]
    assert break_even(ends_noisy) == BreakEven(LINE, 1, 8, (8,))
    text = render_answer(ends_noisy)
    assert ": 1 model, the fewest measured (inconclusive: 8)." in text
    assert fastest([LOOP, noisy, at(4, 0.5)]) == LOOP


def test_lines_are_grouped_by_strategy_dtype_batch_and_px_and_ordered_by_n() -> None:
    rows = [LOOP, at(8, 1.0), at(2, 1.0), at(2, 1.0, image_size=64), at(2, 1.0, dtype="bfloat16")]
    found = sweep.by_line(rows)
    assert list(found) == [LINE, ("vmap", "float32", 1, 64), ("vmap", "bfloat16", 1, 224)]
    assert [row.case.num_models for row in found[LINE]] == [2, 8]


def test_the_build_breaks_even_after_its_cost_over_the_gain_per_call() -> None:
    vmap = changed(VMAP, build_s=5.0, first_call_s=1.0)  # 0.05 s a call against 0.1 s
    loop = changed(LOOP, build_s=0.2, first_call_s=0.3)
    assert break_even_calls(vmap, loop) == pytest.approx((6.0 - 0.5) / 0.05)
    assert break_even_calls(changed(vmap, build_s=0.0, first_call_s=0.0), loop) == 0
    assert break_even_calls(changed(vmap, times_s=(0.2,) * 20), loop) is None
    assert break_even_calls(changed(vmap, build_s=None), loop) is None


def test_extra_memory_is_a_difference_and_unknown_if_either_is() -> None:
    loop = changed(LOOP, peak_memory_bytes=100_000_000)
    assert extra_memory(VMAP, loop) == 96_000_000
    assert extra_memory(VMAP, changed(LOOP, peak_memory_bytes=None)) is None


def test_the_answer_of_a_sweep_gives_the_break_even_of_each_strategy() -> None:
    loops = [changed(LOOP, num_models=n) for n in (1, 2, 4)]
    never = [changed(row, strategy="jax") for row in curve(0.5, 0.6, 0.7)]
    text = render_answer([*loops, *curve(0.9, 1.2, 1.4), *never])
    assert "Break-even of vmap (float32, batch 1, 224 px): 2 models.\n" in text
    assert "Break-even of jax (float32, batch 1, 224 px): none up to 4 models." in text


def test_the_answer_gives_the_cost_of_the_fastest_strategy() -> None:
    loop = changed(LOOP, peak_memory_bytes=100_000_000, build_s=0.0, first_call_s=0.1)
    other = changed(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20, build_s=6.08)
    text = render_answer([loop, VMAP, other])
    assert text.startswith("4 models: folded_vmap is 2.50x faster than the loop")
    assert " and breaks even after 100 calls, with 96 MB more memory; vmap is 2.00x" in text
