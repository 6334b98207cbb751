"""The table, the answer and the remarks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ensemble.bench.measurement import Roofline
from ensemble.bench.report import exports
from ensemble.bench.report.labels import time_lines
from ensemble.bench.report.page import page_of
from ensemble.bench.report.table import (
    WIDTH,
    render_notes,
    render_strategies,
    render_table,
)
from ensemble.bench.report.verdict import render_answer, render_remarks
from ensemble.bench.summary import Run, Summary
from ensemble.strategies import STRATEGIES
from tests.made import (
    CONFIG,
    ENVIRONMENT,
    LOOP,
    UNAVAILABLE,
    VMAP,
    changed,
    row_of,
    with_options,
)

DATA = Path(__file__).parents[1] / "data"
STORED = sorted([*DATA.glob("*.json"), *DATA.glob("allocator/*.json")])


def report(*rows: Summary) -> str:
    return render_answer(rows) + render_remarks(rows, ENVIRONMENT, verbose=True)


def test_the_answer_names_the_reference_the_direction_and_the_interval() -> None:
    assert "4 models: vmap is 2.00x faster than the loop (95% CI 2.00-2.00)" in report(LOOP, VMAP)


def test_a_slower_strategy_leaves_the_loop_the_fastest() -> None:
    slow = changed(VMAP, times_s=(0.2,) * 20)
    assert render_answer([LOOP, slow]) == (
        "4 models: the loop is the fastest; vmap is 0.50x (0.50-0.50).\n"
    )


def test_an_interval_that_contains_1_is_not_significantly_different() -> None:
    level = changed(VMAP, times_s=(0.099, 0.101) * 10)
    assert "not significantly different, 1.00x" in report(LOOP, level)
    faster = changed(VMAP, times_s=(0.096, 0.101) * 10)
    assert "no strategy is significantly faster than the loop; vmap is 1.02x" in report(
        LOOP, faster
    )


def test_a_spread_above_25_percent_is_inconclusive() -> None:
    wild = changed(VMAP, times_s=(0.05, 0.08) * 10)
    text = report(LOOP, wild)
    assert "inconclusive: vmap (too noisy)" in text
    assert "above 25%: no speedup is reported: vmap, 4 models (46%)." in text
    assert "x faster" not in text


def test_a_spread_above_10_percent_is_a_warning_with_advice() -> None:
    noisy = changed(VMAP, times_s=(0.05, 0.057) * 10)
    text = report(LOOP, noisy)
    assert "raise --min_seconds: vmap, 4 models (13%)." in text
    assert "x faster" in text


def test_other_processes_on_the_cpu_are_a_warning() -> None:
    busy = changed(VMAP, others_cpu_share=0.4)
    assert "other processes used the CPU, no speedup is reported: vmap, 4 models (40%)." in report(
        LOOP, busy
    )


def test_others_that_use_a_tenth_of_the_cpu_are_noted_beside_the_speedup() -> None:
    text = report(LOOP, changed(VMAP, others_cpu_share=0.08))
    assert "other processes used the CPU, results may be biased: vmap, 4 models (8%)." in text
    assert "vmap is 2.00x faster" in text
    assert "used the CPU" not in report(LOOP, changed(VMAP, others_cpu_share=0.04))


def test_too_few_pairs_are_inconclusive() -> None:
    few = changed(VMAP, times_s=(0.05,) * 5, reference_times_s=(0.1,) * 5)
    assert "too few pairs (5 pairs); raise --min_pairs" in report(LOOP, few)


def test_page_faults_that_explain_a_slowdown_are_named_with_advice() -> None:
    slow = changed(VMAP, times_s=(0.110,) * 20)  # 12,000 faults of 1 us over 2 threads: 6 of 10 ms
    assert (
        "Page faults cause about 60% of the 10 ms that vmap loses to the loop: 12,000 per call (0"
        " in the loop) at 1.0 us over 2 threads."
    ) in report(LOOP, slow)
    assert "--allocator retain" in report(LOOP, slow)


def test_page_faults_name_their_grid_point() -> None:
    slow = changed(VMAP, times_s=(0.110,) * 20)
    remarks = render_remarks([LOOP, slow, changed(slow, num_models=8)], ENVIRONMENT)
    assert "vmap with 4 models loses to the loop: 12,000 per call" in remarks
    assert "vmap with 8 models loses to the loop: 12,000 per call" in remarks


def test_page_faults_that_explain_less_than_half_of_a_slowdown_are_not_blamed() -> None:
    slow = changed(VMAP, times_s=(0.113,) * 20)
    assert "Page faults" not in report(LOOP, slow)


def test_only_page_faults_beyond_those_of_the_loop_are_blamed() -> None:
    slow = changed(VMAP, times_s=(0.110,) * 20)  # of 12,000 faults 2,000 more: 1 of 10 ms
    assert "Page faults" not in report(LOOP, changed(slow, reference_page_faults_per_call=10_000.0))


def test_first_calls_are_reported_separately_from_the_steady_state() -> None:
    assert (
        "Cold start: the first forward took 0.250 s, 10.0x a steady one; by first calls alone vmap"
        " would be 15.00x, not 2.00x."
    ) in report(LOOP, VMAP)


def test_the_fastest_of_several_is_named() -> None:
    other = changed(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    assert "4 models: folded_vmap is 2.50x faster" in report(LOOP, VMAP, other)
    slow = changed(VMAP, times_s=(0.2,) * 20)
    text = report(LOOP, slow, changed(slow, strategy="folded_vmap"))
    assert "4 models: the loop is the fastest; vmap and folded_vmap tie at 0.50x" in text


def test_the_fastest_is_named_per_dtype() -> None:
    other = changed(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    halves = [changed(VMAP, dtype="bfloat16"), changed(other, dtype="bfloat16")]
    text = report(LOOP, VMAP, other, *halves, changed(LOOP, dtype="bfloat16", times_s=(0.5,) * 20))
    assert "4 models, float32: folded_vmap is 2.50x faster" in text
    assert "4 models, bfloat16: folded_vmap is 2.50x faster" in text


def test_a_row_with_shorter_calls_but_a_faster_loop_is_noted() -> None:
    drifted = changed(VMAP, strategy="folded_vmap", times_s=(0.03,) * 20)
    text = report(LOOP, VMAP, changed(drifted, reference_times_s=(0.05,) * 20))
    assert "Note: folded_vmap, 4 models had shorter calls (30 ms) than vmap (50 ms) at a" in text
    assert "shorter calls" not in report(LOOP, VMAP, changed(VMAP, strategy="folded_vmap"))


def test_an_inconclusive_row_is_never_the_fastest_and_blames_no_page_faults() -> None:
    few = changed(VMAP, times_s=(0.11,) * 5, reference_times_s=(0.1,) * 5)
    text = report(LOOP, few, changed(few, strategy="folded_vmap"))
    assert "4 models: inconclusive: vmap (too few pairs), folded_vmap (too few pairs)." in text
    assert "Page faults" not in text
    assert "too few pairs" in render_table([few])
    assert "1.00" not in render_table([few])


def test_the_self_check_is_never_the_fastest() -> None:
    floor = changed(VMAP, strategy="self_check", times_s=(0.01,) * 20)
    other = changed(VMAP, strategy="folded_vmap", times_s=(0.04,) * 20)
    assert "4 models: folded_vmap is 2.50x faster" in report(LOOP, VMAP, floor, other)
    assert "4 models: vmap is 2.00x faster" in report(LOOP, VMAP, floor)


def test_time_lines_of_several_n_name_the_n() -> None:
    eight = changed(VMAP, num_models=8, times_s=(0.2,) * 20)
    assert time_lines([VMAP, eight])[1::2] == [
        "Time taken for prediction with vmap: 0.050000 (4 models)",
        "Time taken for prediction with vmap: 0.200000 (8 models)",
    ]


def test_a_run_without_comparisons_is_reported_as_such() -> None:
    assert report(UNAVAILABLE) == "Nothing was compared with the loop.\n"


def cells(line: str) -> str:
    return " ".join(line.split())


def test_the_table_has_a_row_per_strategy_with_units_and_no_truncated_cell() -> None:
    lines = render_table([LOOP, VMAP, UNAVAILABLE]).splitlines()
    assert lines[0] == (
        "shared inputs, batch 1, 224 px, float32; medians; speedup over the float32 loop"
    )
    assert cells(lines[1]) == "per call speedup start memory page"
    assert cells(lines[2]) == "strategy N ms (IQR) [95% CI] error (s) (MB) faults"
    assert cells(lines[3]) == "loop 4 100.0 (0.0) 1 (reference) 0.40"
    assert cells(lines[4]) == "vmap 4 50.00 (0.00) 2.00 [2.00, 2.00] 2e-07 0.12 196 12,000"
    assert len(lines) == 5
    assert render_notes([LOOP, VMAP, UNAVAILABLE]) == (
        "Not available here: cudagraph_loop: no CUDA\n"
    )


def test_a_column_of_defaults_is_left_out_unless_verbose() -> None:
    plain = render_table([LOOP, changed(VMAP, page_faults_per_call=0.0)])
    assert "faults" not in plain
    assert "agrees" not in plain
    assert "agrees" in render_table([changed(VMAP, top1_agreement=0.5)])
    everything = render_table([VMAP, UNAVAILABLE], verbose=True)
    assert all(word in everything for word in ("agrees", "faults", "first call", "cudagraph_loop"))


def test_the_default_table_fits_ninety_columns() -> None:
    wide = changed(
        VMAP, strategy="prepacked_concurrent", num_models=64, times_s=(1.2345,) * 20, build_s=123.4
    )
    rows = [changed(LOOP, num_models=64), wide, changed(wide, reference_times_s=(12.0,) * 20)]
    assert max(map(len, render_table(rows).splitlines())) <= WIDTH


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_default_table_of_every_stored_run_fits_ninety_columns(path: Path) -> None:
    rows = [changed(row, notes=()) for row in exports.read(str(path), argument="path").results]
    lines = render_table(rows).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= WIDTH


def test_held_memory_and_that_of_a_model_are_columns_of_the_verbose_table() -> None:
    row = changed(VMAP, held_bytes=217_600_000, bytes_per_model=46_750_000)
    lines = render_table([row, LOOP], verbose=True).splitlines()
    (vmap,) = (line for line in lines if line.startswith("vmap"))
    assert "held  per model" in lines[1]
    assert re.search(r" 218 +46\.8 ", vmap)
    assert "held" not in render_table([row, LOOP])


def test_columns_left_out_of_a_wide_table_are_named_and_shown_by_verbose() -> None:
    long = changed(VMAP, strategy="s" * 25)
    text = render_table([long])
    assert "faults" not in text.splitlines()[2]
    assert "\nLeft out for width: page faults; --verbose shows all.\n" in text
    assert "12,000" in render_table([long], verbose=True)
    assert "Left out" not in render_table([VMAP])


def test_unavailable_strategies_are_grouped_by_reason() -> None:
    names = [name for name in STRATEGIES if name.startswith("cudagraph_")]
    rows = [changed(UNAVAILABLE, strategy=name) for name in [*names, "jax"]]
    assert render_notes([LOOP, *rows]).endswith("Not available here: cudagraph_*, jax: no CUDA\n")
    ran = changed(VMAP, strategy=names[0])
    assert f"Not available here: {names[1]}, {names[2]}, " in render_notes([ran, *rows[1:]])


def test_the_table_of_strategies_is_complete_in_100_columns() -> None:
    text = render_strategies(STRATEGIES)
    assert max(map(len, text.splitlines())) <= 100
    assert {line.split()[0] for line in text.splitlines()} >= set(STRATEGIES)
    assert "…" not in text
    words = set(text.split())
    for strategy in STRATEGIES.values():
        assert words >= set(f"{strategy.summary} {strategy.requires} {strategy.build_time}".split())


def test_color_marks_faster_slower_and_failed_rows_on_request() -> None:
    slow = changed(VMAP, times_s=(0.2,) * 20)
    failed = changed(VMAP, status="failed", error="broke")
    lines = render_table([LOOP, VMAP, slow, failed], color=True).splitlines()
    codes = [("32m" in line and "green") or ("31m" in line and "red") or "" for line in lines[3:7]]
    assert codes == ["", "green", "red", "red"]
    assert "\x1b" not in render_table([LOOP, VMAP, slow, failed])


def test_a_roofline_of_weights_that_fit_the_cache_is_noted() -> None:
    limited = replace(VMAP, roofline=Roofline(0.02, "memory", note="weights fit the L2 cache"))
    assert "weights fit the L2 cache" in render_notes([LOOP, limited])


def test_the_roofline_share_is_in_the_table_if_measured() -> None:
    limited = replace(VMAP, roofline=Roofline(0.02, "compute"))
    assert render_table([limited]).splitlines()[3].endswith(" 40%")
    assert render_table([limited], verbose=True).splitlines()[3].endswith("compute")
    assert "limit" not in render_table([VMAP])


def test_notes_and_reasons_are_listed_once() -> None:
    noted = changed(VMAP, notes=("slow fallback",))
    assert render_notes([noted, LOOP]).endswith("vmap, 4 models: slow fallback\n")
    both = render_notes([noted, changed(noted, num_models=1)])
    assert both == "all rows: slow fallback\n"
    failed = changed(VMAP, status="failed", error="broke", num_models=1)
    assert render_notes([failed]).endswith("vmap, 1 model: failed: broke\n")


def test_the_two_time_lines_come_from_the_same_pairs() -> None:
    drifted = changed(LOOP, times_s=(9.9,) * 20)
    assert time_lines([drifted, VMAP]) == [
        "Time taken for prediction without vmap: 0.100000",
        "Time taken for prediction with vmap: 0.050000",
    ]


def test_a_missing_time_is_reported_as_not_measured() -> None:
    assert time_lines([LOOP]) == [
        "Time taken for prediction without vmap: 0.100000",
        "Time taken for prediction with vmap: not measured",
    ]


def of_processes(*found: tuple[float, float]) -> Summary:
    """A row of processes with these speedups and page faults per call."""
    processes = (
        replace(
            VMAP.measurements[0],
            times_s=(0.1 / speedup,) * 8,
            reference_times_s=(0.1,) * 8,
            page_faults_per_call=faults,
        )
        for speedup, faults in found
    )
    return row_of(*processes)


def test_a_bimodal_row_is_reported_with_the_page_faults_of_each_mode() -> None:
    row = of_processes((0.63, 37e3), (0.74, 37e3), (1.04, 0), (0.70, 37e3), (0.66, 37e3))
    text = report(LOOP, row)
    assert (
        "Bimodal: vmap, 4 models: 0.63-0.74 in 4 of 5 processes (37,000 page faults per call) and"
        " 1.04 in 1 of 5 processes (0 page faults per call). The allocator behaves differently per"
        " process; use --allocator retain."
    ) in text
    assert "Bimodal" not in report(LOOP, of_processes(*[(0.7, 0.0)] * 5))
    near = of_processes((0.7, 37e3), (0.71, 37e3), (0.75, 0), (0.70, 37e3), (0.7, 37e3))
    assert "Bimodal" not in report(LOOP, near)  # 0.75 / 0.71: 6 %


def test_page_faults_of_the_host_are_not_blamed_on_an_accelerator() -> None:
    slow = changed(VMAP, times_s=(0.110,) * 20)
    two_modes = of_processes((0.63, 37e3), (0.64, 37e3), (1.04, 0), (0.62, 37e3), (1.05, 0))
    on_cuda = replace(ENVIRONMENT, device="cuda:0")
    assert "Page faults" in render_remarks([LOOP, slow], ENVIRONMENT)
    assert "Page faults" not in render_remarks([LOOP, slow], on_cuda)
    assert "--allocator retain" in render_remarks([LOOP, two_modes], ENVIRONMENT)
    remarks = render_remarks([LOOP, two_modes], on_cuda)
    assert (
        "Bimodal: vmap, 4 models: 0.62-0.64 in 3 of 5 processes and 1.04-1.05 in 2 of 5 processes."
    ) in remarks
    assert "page faults" not in remarks
    one_apart = of_processes((0.63, 37e3), (0.74, 37e3), (1.04, 0), (0.70, 37e3), (0.66, 37e3))
    assert "Bimodal" not in render_remarks([LOOP, one_apart], on_cuda)


def test_a_large_between_process_spread_is_inconclusive_and_has_no_break_even() -> None:
    wild = of_processes((2.8, 0), (2.9, 0), (2.97, 0), (3.0, 0), (20.0, 0))
    assert wild.speedup_interval is not None
    assert wild.speedup_interval[0] > 1
    assert render_answer([LOOP, wild]) == ("4 models: inconclusive: vmap (too noisy).\n")
    assert "differ too much to report a speedup: vmap, 4" in report(LOOP, wild)
    best = replace(wild, case=replace(wild.case, strategy="best"))
    answer = render_answer([LOOP, changed(VMAP, times_s=(0.08,) * 20), best])
    assert "4 models: vmap is 1.25x faster than the loop" in answer
    assert "; best is inconclusive (too noisy)." in answer


def test_the_between_process_spread_is_reported_if_it_exceeds_the_within_process_one() -> None:
    text = report(LOOP, of_processes((1.0, 0), (1.1, 0), (1.2, 0), (1.3, 0), (1.4, 0)))
    assert "vmap, 4 models (within-process CI +-0%, between-process spread +-17%)." in text


def test_a_between_process_spread_within_the_interval_of_each_process_is_not_reported() -> None:
    calls = (0.07, 0.1, 0.14) * 4
    one = replace(VMAP.measurements[0], times_s=calls)
    rows = [
        replace(one, reference_times_s=tuple(speedup * 0.1 for _ in calls))
        for speedup in (2.0, 2.15, 2.3)
    ]
    row = row_of(*rows)  # 0.3 / 4.3: 7 % to either side
    assert (row.within_processes or 0) > 0.1
    assert row.between_processes == pytest.approx(0.0698, rel=1e-2)
    assert "between-process" not in report(LOOP, row)


def test_the_choice_of_best_is_in_its_row_and_in_the_answer() -> None:
    best = changed(VMAP, strategy="best", picked="lowered_vmap")
    assert "4 models: best (lowered_vmap) is 2.00x faster" in report(LOOP, best)
    assert "\nbest (lowered_vmap)  4  " in render_table([LOOP, best])


def test_the_two_time_lines_name_another_dtype() -> None:
    bf16 = changed(VMAP, dtype="bfloat16")
    assert time_lines([changed(LOOP, dtype="bfloat16"), bf16]) == [
        "Time taken for prediction without vmap: 0.100000 (bfloat16)",
        "Time taken for prediction with vmap: 0.050000 (bfloat16)",
    ]
    assert time_lines([changed(LOOP, dtype="bfloat16")]) == [
        "Time taken for prediction without vmap: 0.100000 (bfloat16)",
        "Time taken for prediction with vmap: not measured (bfloat16)",
    ]
    assert time_lines([LOOP, VMAP, bf16]) == time_lines([LOOP, VMAP])


ON_CUDA = changed(
    VMAP,
    device_times_s=(0.0451,) * 20,
    reference_device_times_s=(0.09,) * 20,
    with_copies_s=0.0534,
    peak_reserved_bytes=412_000_000,
    page_faults_per_call=0.0,
)


def test_times_of_a_gpu_with_copies_and_reserved_memory_have_columns_if_there_are_such() -> None:
    lines = render_table([LOOP, ON_CUDA]).splitlines()
    assert cells(lines[1]) == "per call GPU with copies speedup start memory reserved"
    assert cells(lines[2]) == "strategy N ms (IQR) (ms) (ms) [95% CI] error (s) (MB) (MB)"
    assert cells(lines[4]) == (
        "vmap 4 50.00 (0.00) 45.10 53.40 2.00 [2.00, 2.00] 2e-07 0.12 196 412"
    )
    for word in ("GPU", "copies", "reserved"):
        assert word not in render_table([LOOP, VMAP])
    assert ON_CUDA.speedup == 2.0  # of wall times


def test_a_table_with_times_of_a_gpu_fits_110_columns_and_keeps_them() -> None:
    row = changed(ON_CUDA, strategy="best", picked="cudagraph_compiled_concurrent", num_models=32)
    text = render_table([row])
    assert max(map(len, text.splitlines())) <= 110
    assert "45.10" in text
    assert "53.40" in text
    assert "Left out for width: IQR, reserved memory" in text


def test_the_caption_says_that_the_l2_cache_was_flushed() -> None:
    config = with_options(CONFIG, flush_l2=True)
    flushed = page_of(Run(ENVIRONMENT, config.plain(), (VMAP,)), columns=False, sentences=False)
    assert flushed.table.splitlines()[0].endswith(
        "speedup over the float32 loop; L2 cache flushed before each call"
    )
    plain = page_of(Run(ENVIRONMENT, CONFIG.plain(), (VMAP,)), columns=False, sentences=False)
    assert "L2" not in plain.table


def test_the_answer_says_what_a_cuda_graph_of_the_loop_alone_gives() -> None:
    graph = changed(VMAP, strategy="cudagraph_loop", times_s=(0.04,) * 20)
    best = changed(VMAP, strategy="best", picked="cudagraph_vmap", times_s=(0.02,) * 20)
    assert render_answer([LOOP, VMAP, graph, best]) == (
        "4 models: best (cudagraph_vmap) is 5.00x faster than the loop (95% CI 5.00-5.00) and"
        " breaks even after 0 calls; vmap is 2.00x (2.00-2.00); a CUDA graph of the loop alone"
        " (cudagraph_loop) is 2.50x (2.50-2.50).\n"
    )
    first = render_answer([LOOP, VMAP, graph])
    assert first.startswith("4 models: cudagraph_loop is 2.50x faster than the loop")
    assert "alone" not in first
    failed = changed(graph, status="failed", error="broke")
    assert "alone" not in render_answer([LOOP, VMAP, failed, best])


def test_page_faults_are_not_blamed_for_a_slowdown_on_a_gpu() -> None:
    slow = changed(VMAP, times_s=(0.110,) * 20)
    on_cuda = replace(ENVIRONMENT, device="cuda:0")
    assert "Page faults" in render_remarks([LOOP, slow], ENVIRONMENT)
    assert "Page faults" not in render_remarks([LOOP, slow], on_cuda)
