from dataclasses import replace

from ensemble.report import render_table, time_lines
from ensemble.results import Result
from ensemble.verdict import render_verdict
from tests.test_results import ENVIRONMENT, ROW

LOOP = replace(
    ROW, strategy="loop", times_s=(0.1,) * 20, reference_times_s=(), notes=(), first_call_s=0.3
)
VMAP = replace(
    ROW,
    times_s=(0.05,) * 20,
    reference_times_s=(0.1,) * 20,
    notes=(),
    first_call_s=0.02,
    max_rel_error=2e-7,
    top1_agreement=1.0,
    peak_memory_bytes=196_000_000,
    page_faults_per_call=12_000.0,
    reference_page_faults_per_call=0.0,
)
FAILED = Result("captured", 4, 1, 224, "float32", "shared", status="unavailable", error="no CUDA")


def verdict(*rows: Result) -> str:
    return render_verdict(rows, ENVIRONMENT)


def test_the_verdict_names_the_reference_the_direction_and_how_surely():
    assert (
        "Verdict: vmap, 4 models on cpu: 2.00 times faster than the reference (the float32 loop),"
        " 99% interval 2.00 to 2.00, 20 pairs."
    ) in verdict(LOOP, VMAP)


def test_a_strategy_that_loses_is_called_slower():
    slow = replace(VMAP, times_s=(0.2,) * 20)
    assert "vmap, 4 models on cpu: 0.50 times: slower than the reference" in verdict(LOOP, slow)


def test_an_interval_that_holds_one_claims_no_difference():
    level = replace(VMAP, times_s=(0.099, 0.101) * 10)
    assert "no difference from the reference (the float32 loop) that this run can show" in verdict(
        LOOP, level
    )


def test_a_spread_above_a_quarter_claims_nothing_and_gives_the_number_and_advice():
    wild = replace(VMAP, times_s=(0.05, 0.08) * 10)
    text = verdict(LOOP, wild)
    assert "too noisy to say: the inter-quartile range is 46% of the median, above 25%" in text
    assert "raise --min_seconds" in text
    assert "faster" not in text


def test_a_spread_above_a_tenth_is_warned_of():
    noisy = replace(VMAP, times_s=(0.05, 0.057) * 10)
    text = verdict(LOOP, noisy)
    assert "Warning: vmap: noisy, the inter-quartile range is 13% of the median" in text
    assert "times faster" in text


def test_other_programs_that_take_the_cpu_are_warned_of():
    beside = replace(VMAP, others_cpu_share=0.4)
    assert "Warning: vmap: other programs took 40% of the CPU while this was timed" in verdict(
        LOOP, beside
    )


def test_too_few_pairs_claim_nothing():
    few = replace(VMAP, times_s=(0.05,) * 7, reference_times_s=(0.1,) * 7)
    assert "7 pairs are too few to say; raise --min_pairs" in verdict(LOOP, few)


def test_page_faults_that_explain_a_loss_are_named_with_the_way_out():
    slow = replace(VMAP, times_s=(0.110,) * 20)  # 12,000 faults of 1 us over 2 threads: 6 of 10 ms
    assert (
        "Page faults explain this: 12,000 a call against 0 in the reference, at 1.0 us each over 2"
        " threads, are about 60% of the 10 ms lost."
    ) in verdict(LOOP, slow)
    assert "--allocator retain" in verdict(LOOP, slow)


def test_page_faults_that_explain_less_than_half_of_a_loss_are_not_blamed():
    slow = replace(VMAP, times_s=(0.113,) * 20)
    assert "Page faults" not in verdict(LOOP, slow)


def test_first_calls_are_told_apart_from_the_steady_state():
    assert (
        "Cold starts: the very first forward of this process took 0.250 s, 10.0 times a steady one."
        " The first calls after it (loop 0.300 s, vmap 0.020 s) would have said 15.00 times."
    ) in verdict(LOOP, VMAP)


def test_the_fastest_of_several_is_named():
    other = replace(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    assert "Fastest with 4 models: folded_vmap, 2.50 times" in verdict(LOOP, VMAP, other)
    slow = replace(VMAP, times_s=(0.2,) * 20)
    text = verdict(LOOP, slow, replace(slow, strategy="folded_vmap"))
    assert "Fastest with 4 models: the reference itself" in text


def test_the_fastest_is_named_for_each_dtype_apart():
    other = replace(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    halves = [replace(VMAP, dtype="bfloat16"), replace(other, dtype="bfloat16")]
    text = verdict(LOOP, VMAP, other, *halves, replace(LOOP, dtype="bfloat16", times_s=(0.5,) * 20))
    assert "Fastest with 4 models, float32: folded_vmap, 2.50 times" in text
    assert "Fastest with 4 models, bfloat16: folded_vmap, 2.50 times" in text


def test_a_row_with_shorter_calls_beside_a_faster_loop_is_named():
    drifted = replace(VMAP, strategy="folded_vmap", times_s=(0.03,) * 20)
    text = verdict(LOOP, VMAP, replace(drifted, reference_times_s=(0.05,) * 20))
    assert "But folded_vmap had the shorter calls, 30 ms against 50 ms: the loop ran" in text
    assert "shorter calls" not in verdict(LOOP, VMAP, replace(VMAP, strategy="folded_vmap"))


def test_a_figure_that_claims_nothing_is_not_called_the_fastest_and_blames_nothing():
    few = replace(VMAP, times_s=(0.11,) * 7, reference_times_s=(0.1,) * 7)
    text = verdict(LOOP, few, replace(few, strategy="folded_vmap"))
    assert "Fastest with 4 models: not sure enough to say, because of vmap, folded_vmap." in text
    assert "Page faults" not in text
    assert "too few pairs" in render_table([few])
    assert "1.00" not in render_table([few])


def test_the_self_check_is_never_the_fastest():
    floor = replace(VMAP, strategy="self_check", times_s=(0.01,) * 20)
    other = replace(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    assert "Fastest with 4 models: folded_vmap, 2.50 times" in verdict(LOOP, VMAP, floor, other)
    assert "Fastest" not in verdict(LOOP, VMAP, floor)


def test_time_lines_of_several_numbers_of_models_say_which():
    eight = replace(VMAP, num_models=8, times_s=(0.2,) * 20)
    assert time_lines([VMAP, eight])[1::2] == [
        "Time taken for prediction with vmap: 0.050000 (4 models)",
        "Time taken for prediction with vmap: 0.200000 (8 models)",
    ]


def test_nothing_compared_is_said_and_not_passed_over():
    assert verdict(FAILED) == "Verdict: nothing was compared with the reference.\n"


def test_the_table_has_a_row_a_strategy_with_its_units_and_no_cell_cut():
    lines = render_table([LOOP, VMAP, FAILED]).splitlines()
    assert " ".join(lines[4].split()) == "loop 4 0.10 0.300 100.00 0.00 1 (reference)"
    assert " ".join(lines[5].split()) == (
        "vmap 4 0.10 0.020 50.00 0.00 2.00 [2.00, 2.00] 2.0e-07 100.0% 196 12,000"
    )
    assert lines[6].split() == ["captured", "4", "unavailable"]
    assert lines[7] == "captured, 4 models: unavailable: no CUDA"


def test_the_share_of_the_limit_stands_in_the_table_where_it_was_asked_for():
    limited = replace(VMAP, least_s=0.02, bound="compute")
    assert render_table([limited]).splitlines()[4].endswith("40%   compute")
    assert "bound" not in render_table([VMAP])


def test_a_note_of_a_row_stands_under_the_table():
    noted = replace(VMAP, notes=("slow fallback",))
    assert render_table([noted]).endswith("vmap, 4 models: note: slow fallback\n")


def test_the_two_time_lines_come_from_the_same_pairs():
    drifted = replace(LOOP, times_s=(9.9,) * 20)
    assert time_lines([drifted, VMAP]) == [
        "Time taken for prediction without vmap: 0.100000",
        "Time taken for prediction with vmap: 0.050000",
    ]


def test_a_time_that_was_not_taken_is_said_so():
    assert time_lines([LOOP]) == [
        "Time taken for prediction without vmap: 0.100000",
        "Time taken for prediction with vmap: not measured",
    ]
