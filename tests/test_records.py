"""What a record derives from its raw times."""

from dataclasses import replace

from ensemble.bench.report.table import render_table
from ensemble.bench.report.verdict import render_answer, render_remarks
from ensemble.bench.summary import Summary
from tests.made import (
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
    assert changed(VMAP, times_s=(0.001,) * 20).beyond_contention is None  # a quiet machine


def test_rows_that_are_noisy_in_the_same_way_share_a_line() -> None:
    first = changed(VMAP, others_cpu_share=0.4)
    second = changed(VMAP, others_cpu_share=0.5, num_models=8)
    remarks = render_remarks([LOOP, first, second], ENVIRONMENT)
    assert remarks.count("Warning") == 1
    assert "reported: vmap, 4 models (40%); vmap, 8 models (50%).\n" in remarks
