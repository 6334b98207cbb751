"""What a record derives from its raw times."""

from dataclasses import replace

import pytest

from ensemble.bench.measurement import RankTimes
from ensemble.bench.report.comparison import compare
from ensemble.bench.report.table import render_table
from ensemble.bench.report.verdict import render_answer, render_remarks
from ensemble.bench.summary import Run, Summary
from tests.made import (
    CASE,
    ENVIRONMENT,
    LOOP,
    ONE,
    ROW,
    VMAP,
    changed,
    row_of,
)


def test_the_speedup_is_the_median_of_the_ratios_of_pairs_and_not_a_ratio_of_medians() -> None:
    assert ROW.speedup == 1.5  # of 2/1, 3/2, 2/4; the medians' ratio would be 1.0


def test_the_reference_has_a_speedup_of_one_without_an_interval() -> None:
    reference = changed(ROW, strategy="loop", reference_times_s=())
    assert reference.speedup == 1.0
    assert reference.speedup_interval is None


def test_a_loop_in_another_dtype_is_not_the_reference() -> None:
    assert changed(ROW, strategy="loop", dtype="bfloat16").speedup == 1.5


def test_a_row_that_failed_has_no_speedup_even_where_it_has_times() -> None:
    failed = changed(ROW, status="failed", error="outputs disagree")
    assert failed.speedup is None
    assert failed.speedup_interval is None


def test_noise_is_the_worse_spread_of_the_two() -> None:
    noisy = changed(ROW, times_s=(1.0, 1.0, 1.0), reference_times_s=(1.0, 2.0, 3.0))
    assert noisy.noise == 0.5


def test_the_build_of_a_row_holds_what_its_first_process_took_to_choose_for_all() -> None:
    first = replace(ONE, build_s=7.0, tune_s=5.0)
    others = (replace(ONE, build_s=1.0), replace(ONE, build_s=1.5))
    row = row_of(replace(first, picked="folded_loop"), *others)
    assert row.build_s == 6.5  # 5, and the median of 2, 1 and 1.5
    assert row.start_s == 6.7
    assert row.name == "vmap (folded_loop)"
    assert (ROW.tune_s, ROW.build_s, ROW.name) == (None, 0.1, "vmap")


@pytest.mark.parametrize(
    ("strategy", "picked", "start_s"),
    [
        ("compiled_loop", None, 9.0),
        ("cudagraph_compiled_vmap", None, 9.0),
        ("best", "compiled_vmap", 9.0),
        ("best", "folded_vmap", 1.5),
        ("vmap", None, 1.5),
    ],
)
def test_the_start_of_what_is_compiled_is_that_of_the_first_process(
    strategy: str, picked: str | None, start_s: float
) -> None:
    """The others read from a cache on disk what it compiled."""
    cold = replace(ONE, case=replace(CASE, strategy=strategy), picked=picked)
    cold = replace(cold, build_s=6.0, first_call_s=3.0)
    warm = replace(cold, build_s=1.0, first_call_s=0.5)
    assert row_of(cold, warm, warm).start_s == start_s


def test_of_several_processes_costs_are_typical_and_errors_and_memory_the_worst() -> None:
    row = row_of(
        *(
            replace(
                ONE,
                times_s=(1.0,) * 8,
                reference_times_s=(speedup,) * 8,
                peak_memory_bytes=memory,
                first_call_s=cost,
                page_faults_per_call=10 * cost,
                reference_page_faults_per_call=100 * cost,
                others_cpu_share=cost / 100,
                max_rel_error=error,
                error_float64=error / 10,
                top1_agreement=1 - error,
            )
            for speedup, memory, cost, error in (
                (2.5, 100, 3.0, 0.02),
                (2.0, 300, 9.0, 0.03),
                (1.9, 200, 4.0, 0.01),
            )
        )
    )
    assert row.speedup == 2.0
    assert row.peak_memory_bytes == 300
    assert row.first_call_s == 4.0
    assert row.page_faults_per_call == 40.0
    assert row.reference_page_faults_per_call == 400.0
    assert row.others_cpu_share == 0.04
    assert row.max_rel_error == 0.03
    assert row.error_float64 == 0.003
    assert row.top1_agreement == 0.97


def test_of_several_processes_the_spread_between_them_decides_whether_it_is_too_noisy() -> None:
    def processes(*speedups: float) -> Summary:
        """Processes whose calls vary by more than a half, with these medians of the pairs."""
        calls = (0.07, 0.1, 0.14) * 4
        one = replace(VMAP.measurements[0], times_s=calls)
        return row_of(
            *(
                replace(one, reference_times_s=tuple(speedup * call for call in (0.1,) * 12))
                for speedup in speedups
            )
        )

    alike, apart = processes(2.0, 2.01, 1.99), processes(1.0, 2.0, 4.0)
    assert (alike.noise or 0) > 0.25
    assert alike.inconclusive is None
    assert apart.inconclusive == "too noisy"  # e ** (log 2 +- 4.303 * 0.4): 0.36 to 11


def test_a_row_that_fails_in_a_later_process_has_failed() -> None:
    row = row_of(ONE, replace(ONE, status="failed", error="broke"))
    assert (row.status, row.error, row.speedup) == ("failed", "in process 2: broke", None)


def test_a_call_over_ranks_is_split_into_forward_interference_and_communication() -> None:
    """10 s a call, of which the slowest forward takes 8, and 6 while the other ranks are idle."""
    ranks = RankTimes(whole_s=(10.0,), forward_s=(8.0,), alone_s=(6.0,), one_rank_s=(30.0,))
    assert ranks.parallel_efficiency == pytest.approx(0.6)
    assert ranks.interference == pytest.approx(0.2)
    assert ranks.communication == pytest.approx(0.2)
    assert ranks.speedup_over_one_rank == pytest.approx(3.0)
    assert RankTimes(whole_s=(10.0,)).interference is None


def test_nothing_is_claimed_beside_other_programs_that_take_much_of_the_cpu() -> None:
    assert changed(VMAP, others_cpu_share=0.1).inconclusive is None
    busy = changed(VMAP, others_cpu_share=0.5)
    assert busy.inconclusive == "CPU busy"
    remarks = render_remarks([LOOP, busy], ENVIRONMENT)
    assert "other processes used the CPU, no speedup is reported: vmap, 4 models (50%)." in remarks
    assert "inconclusive: vmap (CPU busy)" in render_answer([LOOP, busy])


def busy(*, ours: tuple[float, float], theirs: tuple[float, float]) -> Summary:
    """A row beside other programs, of calls that take the one time or the other."""
    return changed(VMAP, times_s=ours * 10, reference_times_s=theirs * 10, others_cpu_share=0.6)


def test_beside_other_programs_a_difference_is_claimed_where_the_fastest_calls_show_it() -> None:
    far = busy(ours=(0.016, 0.02), theirs=(0.9, 1.666))
    assert far.inconclusive == "CPU busy"
    assert far.beyond_contention == "faster"
    assert "Still, vmap is faster than the loop: its fastest call took 16 ms" in (
        render_answer([LOOP, far])
    )
    assert "faster: CPU busy" in render_table([LOOP, far])
    assert busy(ours=(0.9, 1.666), theirs=(0.016, 0.02)).beyond_contention == "slower"


def test_medians_that_other_programs_have_put_apart_claim_nothing() -> None:
    apart = busy(ours=(0.02, 0.02), theirs=(0.05, 4.0))
    assert apart.beyond_contention is None
    fastest = busy(ours=(0.01, 0.03), theirs=(0.06, 0.06))  # 6 times, but pairs of 2 and of 6
    assert fastest.inconclusive == "CPU busy"
    assert fastest.beyond_contention is None
    assert changed(VMAP, times_s=(0.001,) * 20).beyond_contention is None  # a quiet machine


def test_rows_that_are_noisy_in_the_same_way_share_a_line() -> None:
    first = changed(VMAP, others_cpu_share=0.4)
    second = changed(VMAP, others_cpu_share=0.5, num_models=8)
    remarks = render_remarks([LOOP, first, second], ENVIRONMENT)
    assert remarks.count("Warning") == 1
    assert "reported: vmap, 4 models (40%); vmap, 8 models (50%).\n" in remarks


def with_alone(*speedups: float, paired: float = 1.0) -> Summary:
    """A row whose loop takes 0.1 s alone, and `paired` times that in the pairs."""
    one = VMAP.measurements[0]
    return row_of(
        *(
            replace(
                one,
                times_s=(0.1 / speedup,) * 8,
                reference_times_s=(0.1 * paired + 1e-4 * k,) * 8,
                reference_alone_times_s=(0.1,) * 6,
            )
            for k, speedup in enumerate(speedups)
        )
    )


def test_the_speedup_is_over_the_reference_alone_where_the_strategy_slows_it() -> None:
    row = with_alone(2.0, 2.1, 1.9, paired=1.3)
    assert row.process_speedups == pytest.approx((2.0, 2.1, 1.9))
    assert row.speedup == pytest.approx(2.0)
    assert row.reference_median_s == 0.1
    one = with_alone(2.0, paired=1.3)
    assert one.speedup_interval == pytest.approx((2.0, 2.0))
    near = with_alone(2.0, 2.1, 1.9, paired=1.04)  # pairs, in which drift cancels
    assert near.process_speedups == pytest.approx((2.08, 2.1861, 1.9798), rel=1e-3)
    assert near.reference_median_s == pytest.approx(0.1041)
    faster = with_alone(2.0, 2.1, 1.9, paired=0.8)  # a warmer heap is no merit of the strategy
    assert faster.process_speedups == pytest.approx((1.6, 1.6821, 1.5238), rel=1e-3)
    wide = replace(
        one.measurements[0],
        reference_times_s=(0.13,) * 8,
        times_s=(0.05, 0.06, 0.05, 0.04) * 2,
        reference_alone_times_s=(0.09, 0.1, 0.11) * 2,
    )
    low, high = row_of(wide).speedup_interval or (0, 0)
    assert low < 1.8 < 2.0 < 2.2 < high  # both medians vary


def test_a_loop_that_a_strategy_slows_is_noted() -> None:
    slowed = with_alone(2.0, 2.0, 2.0, paired=1.3)
    remarks = render_remarks([LOOP, slowed], ENVIRONMENT)
    assert (
        "Note: vmap, 4 models: in turns with it the loop takes 1.30x as long as alone, before it"
        " was built; the speedup is over the loop alone." in remarks
    )
    near = with_alone(2.0, 2.0, 2.0, paired=1.04)
    assert "in turns" not in render_remarks([LOOP, near, VMAP], ENVIRONMENT)


def test_a_slower_loop_is_not_noted_where_its_processes_disagree() -> None:
    one = with_alone(2.0, paired=1.0).measurements[0]
    row = row_of(
        *(replace(one, reference_times_s=(0.1 * factor,) * 8) for factor in (0.8, 1.3, 2.2))
    )
    assert row.slowdown_of_reference is not None
    low, high = row.slowdown_of_reference.interval()
    assert low < 1 < 1.3 < high  # e ** (0.276 +- 4.303 * 0.292)
    assert "in turns" not in render_remarks([LOOP, row], ENVIRONMENT)


def test_a_baseline_without_times_of_the_loop_alone_is_compared_by_its_pairs() -> None:
    old = row_of(
        *(
            replace(one, reference_alone_times_s=())
            for one in with_alone(2.0, 2.01, 1.99).measurements
        )
    )
    runs = [
        Run(ENVIRONMENT, {}, (row,))
        for row in (with_alone(2.0, 2.01, 1.99, paired=1.3), with_alone(2.0, 2.01, 1.99))
    ]
    (by_pairs,) = compare(runs[0], Run(ENVIRONMENT, {}, (old,)))
    assert by_pairs.ratio == pytest.approx(1 / 1.3, rel=0.01)
    (alone,) = compare(*runs)
    assert alone.ratio == pytest.approx(1.0)


def test_a_row_without_times_alone_in_one_process_is_over_its_pairs_in_all() -> None:
    """As a row has that a later version resumes."""
    slowed = with_alone(2.0, 2.0, 2.0, paired=1.3)
    first, *others = slowed.measurements
    mixed = row_of(replace(first, reference_alone_times_s=()), *others)
    assert slowed.is_over_reference_alone
    assert not mixed.is_over_reference_alone
    assert len(mixed.process_speedups) == 3
    assert mixed.speedup == pytest.approx(2.6, rel=0.01)
