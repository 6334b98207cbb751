"""The break-even of a strategy, and its cost."""

from dataclasses import replace

import pytest

from ensemble.bench.report import sweep
from ensemble.bench.report.sweep import (
    BreakEven,
    break_even,
    break_even_calls,
    extra_memory,
    leaders,
)
from ensemble.bench.report.verdict import render_answer, render_remarks
from ensemble.bench.summary import Summary
from tests.made import (
    ENVIRONMENT,
    LOOP,
    VMAP,
    at,
    changed,
    curve,
    row_of,
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
    assert leaders([LOOP, noisy, failed]) is None
    ends_noisy = [at(1, 1.5), at(2, 1.5), changed(noisy, num_models=8)]
    assert break_even(ends_noisy) == BreakEven(LINE, 1, 8, (8,))
    text = render_answer(ends_noisy)
    assert ": 1 model, the fewest measured (inconclusive: 8)." in text
    found = leaders([LOOP, noisy, at(4, 0.5)])
    assert found is not None
    assert found.rows == (at(4, 0.5),)
    assert found.is_slower


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
    slow_loop = changed(loop, times_s=(0.7,) * 20)  # elsewhere: the gain is over its own loop
    assert break_even_calls(vmap, slow_loop) == pytest.approx((6.0 - 0.5) / 0.05)


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


def of_processes(strategy: str, *speedups: float) -> Summary:
    """A row of one pair a process."""
    one = VMAP.measurements[0]
    case = replace(one.case, strategy=strategy)
    return row_of(
        *(
            replace(one, case=case, times_s=(0.1 / speedup,) * 8, reference_times_s=(0.1,) * 8)
            for speedup in speedups
        )
    )


A = of_processes("folded_vmap", 2.0, 2.02, 1.98, 2.01, 1.99)
B = of_processes("jax", 2.05, 1.97, 1.99, 2.03, 2.0)
SLOWER = of_processes("vmap", 1.5, 1.52, 1.48, 1.51, 1.49)


def test_rows_that_are_not_significantly_slower_than_the_fastest_tie_with_it() -> None:
    found = leaders([LOOP, SLOWER, A, B])
    assert found is not None
    assert found.rows == (A, B)  # by speedup: medians of 2.0 both
    assert found.speedup == pytest.approx(2.0)
    intervals = [row.speedup_interval or (0, 0) for row in (A, B)]
    assert found.interval == (min(intervals)[0], max(high for _, high in intervals))
    answer = render_answer([LOOP, SLOWER, A, B])
    assert answer.startswith(
        "4 models: folded_vmap and jax tie at 2.00x the speed of the loop (95% CI"
    )
    assert "; vmap is 1.50x (1.48-1.52)." in answer


def test_a_tie_has_the_mean_and_all_intervals_of_its_rows_and_the_cost_of_the_fastest() -> None:
    wide = of_processes("jax", 1.8, 2.4, 2.0, 1.5, 1.9)
    fast = of_processes("folded_vmap", 2.05, 2.1, 2.15, 2.12, 2.08)
    fast, wide = changed(fast, build_s=6.25), changed(wide, build_s=10.0)
    found = leaders([LOOP, wide, fast])
    assert found is not None
    assert found.rows == (fast, wide)
    assert found.speedup == pytest.approx((2.1 * 1.9) ** 0.5)
    (low, high), inner = wide.speedup_interval or (0, 0), fast.speedup_interval or (0, 0)
    assert low < inner[0] < inner[1] < high
    assert found.interval == (low, high)
    loop = changed(LOOP, build_s=0.0, first_call_s=0.02)
    # 6.25 s of the fastest and as long a first call, over 0.1 s - 0.1 s / 2.1 = 0.05238 s a call
    assert "; folded_vmap breaks even after 119 calls" in render_answer([loop, wide, fast])


def test_one_clear_winner_has_the_figure_and_the_interval_of_its_row() -> None:
    found = leaders([LOOP, SLOWER, A])
    assert found is not None
    assert (found.rows, found.speedup, found.interval) == ((A,), A.speedup, A.speedup_interval)


def test_a_tie_that_contains_the_loop_is_no_winner() -> None:
    level = [of_processes(name, 0.98, 1.02, 1.03, 0.99, 1.01) for name in ("jax", "a", "b", "c")]
    answer = render_answer([LOOP, *level])
    assert answer.startswith(
        "4 models: no strategy is significantly faster than the loop; jax, a and 2 others tie at"
        " 1.01x"
    )


def test_the_more_rows_are_compared_the_larger_a_difference_must_be() -> None:
    close = of_processes("vmap", 1.93, 1.96, 1.9, 1.94, 1.92)
    two = leaders([A, close])
    assert two is not None
    assert two.rows == (A,)
    many = [of_processes(f"s{k}", 1.0, 1.1, 0.9, 1.0, 1.0) for k in range(400)]
    among_many = leaders([A, close, *many])
    assert among_many is not None
    assert among_many.rows == (A, close)


def test_rows_ordered_differently_by_speedup_and_by_time_are_noted() -> None:
    slow_loop = row_of(
        *(
            replace(one, times_s=(0.0192,) * 8, reference_times_s=(0.0301 + k * 1e-5,) * 8)
            for k, one in enumerate(A.measurements)
        )
    )
    fast_loop = row_of(
        *(
            replace(one, times_s=(0.018,) * 8, reference_times_s=(0.0245 + k * 1e-5,) * 8)
            for k, one in enumerate(B.measurements)
        )
    )
    assert sweep.disordered([fast_loop, slow_loop]) == [(slow_loop, fast_loop)]
    assert sweep.disordered([A, B, SLOWER]) == []
    remarks = render_remarks([LOOP, fast_loop, slow_loop], ENVIRONMENT)
    assert (
        "Note: jax, 4 models had shorter calls (18 ms) than folded_vmap (19.2 ms) at a smaller"
        " speedup: the loop was faster too in its processes." in remarks
    )
