"""The answer, the table and the picture of load tests, by value."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble.bench.load.record import LoadRun, LoadTest, RateEstimate, sustained_interval
from ensemble.bench.measurement import Measurement
from ensemble.bench.report import curves, load_picture, load_table
from ensemble.bench.report.page import is_load_test, page_of
from ensemble.bench.summary import Run, Summary
from tests.made import CASE, CONFIG, ENVIRONMENT, changed, row_of, with_options

RUN = LoadRun(
    purpose="confirm",
    offered_qps=100.0,
    seed=0,
    seconds=8.0,
    requests=800,
    answered=800,
    refused=0,
    failed=0,
    p50_s=0.02,
    p90_s=0.03,
    p99_s=0.05,
    tail_s=0.05,
    longest_s=0.06,
    valid=True,
    why_not=None,
    mean_batch=1.5,
    wasted_share=0.25,
    cpu_s_per_request=0.004,
    overhead_s=0.0001,
)


def served(
    strategy: str, *points: tuple[float, float], sustained: float, inputs: str = "shared"
) -> Any:
    """A row with a run at each (rate, tail in s), which sustains one of the rates."""
    runs = tuple(
        replace(
            RUN,
            purpose="confirm" if rate == sustained else "curve",
            offered_qps=rate,
            tail_s=tail,
            valid=rate <= sustained,
            why_not=None if rate <= sustained else "late",
        )
        for rate, tail in points
    )
    case = replace(CASE, strategy=strategy, inputs=inputs)
    test = LoadTest("server", 99.0, 0.1, runs)
    return row_of(Measurement(case, build_s=1.0, first_call_s=0.5, load=test))


LOOP = served("loop", (20.0, 0.010), (60.0, 0.08), (70.0, 0.2), sustained=60.0, inputs="per_model")
VMAP = served("vmap", (30.0, 0.030), (90.0, 0.05), (110.0, 0.3), sustained=90.0, inputs="per_model")


def test_the_answer_names_the_highest_sustained_rate_and_the_lowest_latency_by_rate() -> None:
    answer = load_table.render_answer([LOOP, VMAP])
    assert answer.splitlines()[0] == (
        "4 models, per-model inputs: vmap sustains 90 requests/s with p99 <= 100 ms; loop 60."
    )
    # loop: 10 + 1.75 (rate - 20) ms; vmap: 30 + (rate - 30) / 3 ms, 5 % lower from 32.9 on.
    first, second = curves.lowest_latency([LOOP, VMAP])
    assert (first.strategy, second.strategy) == ("loop", "vmap")
    assert second.from_qps == pytest.approx(32.9, abs=0.4)
    assert "loop up to 33" in answer.splitlines()[1]


def test_one_strategy_with_the_lowest_latency_at_every_rate_is_named_once() -> None:
    slow = served("vmap", (20.0, 0.05), (50.0, 0.09), sustained=50.0)
    answer = load_table.render_answer(
        [served("loop", (20.0, 0.01), (60.0, 0.05), sustained=60.0), slow]
    )
    assert answer.splitlines()[1] == "Lowest p99 at every rate: loop."


def test_a_row_without_a_valid_run_has_no_rate_and_a_reason() -> None:
    none = served("vmap", (30.0, 0.3), sustained=0.0)
    assert curves.sustained_qps(none) is None
    assert load_table.render_answer([none]).strip().endswith("no strategy had a valid run.")
    assert "vmap, 4 models: invalid: late" in load_table.render_remarks([none])
    refused = replace(RUN, refused=7, most_waiting=9)
    test = LoadTest("server", 99.0, 0.1, (replace(refused, valid=True),))
    remarks = load_table.render_remarks([row_of(Measurement(CASE, load=test))])
    assert "7 of 800 requests were refused" in remarks


def test_the_table_has_the_figures_of_the_reported_run() -> None:
    table = load_table.render_table([LOOP, VMAP])
    (line,) = [line for line in table.splitlines() if line.startswith("vmap")]
    figures = "vmap 4 90 20.0 30.0 50.0 1.50 25% 4.0 0.10 1.5"
    assert line.split() == figures.split()


def test_the_verbose_table_under_load_has_the_memory_that_is_held() -> None:
    row = changed(VMAP, held_bytes=217_600_000, bytes_per_model=46_750_000)
    lines = load_table.render_table([row], verbose=True).splitlines()
    assert lines[1].endswith("held  per model")
    assert lines[-1].endswith(" 218       46.8")
    assert "held" not in load_table.render_table([row])


def test_a_row_reports_the_process_with_the_median_sustained_rate() -> None:
    rates = (80.0, 100.0, 90.0)
    row = row_of(*(served("vmap", (rate, 0.05), sustained=rate).processes[0] for rate in rates))
    assert curves.sustained_qps(row) == 90.0
    # Logarithms of mean 4.4964 and deviation 0.1118; t of 2 degrees 4.303: a half-width of 0.2777.
    assert sustained_interval(row.load_tests) == pytest.approx((67.93, 118.3), rel=1e-3)
    assert "90 [67.9, 118]" in load_table.render_table([row])


def searched(late: int, estimate: RateEstimate | None, *rates: float) -> Any:
    """A row of one search with a run at each rate; LoadGen calls none valid."""
    runs = tuple(
        replace(
            RUN, purpose="search", offered_qps=rate, late=late, valid=False, why_not="late",
            tail_s=rate / 1000, p50_s=rate / 2000,
        )
        for rate in rates
    )  # fmt: skip
    test = LoadTest("server", 99.0, 0.1, runs, estimate)
    return row_of(Measurement(CASE, build_s=1.0, first_call_s=0.5, load=test))


def test_a_search_reports_its_estimate_with_its_interval_and_the_nearest_run() -> None:
    row = searched(9, RateEstimate(95.0, 90.0, 100.0), 80.0, 94.0, 110.0)
    assert curves.sustained_qps(row) == 95.0
    run = curves.reported_run(row)
    assert run is not None
    assert run.offered_qps == 94.0
    answer = load_table.render_answer([row])
    expected = "vmap sustains 95 requests/s (95% CI 90-100) with p99 <= 100 ms."
    assert answer.splitlines()[0] == f"4 models, shared inputs: {expected}"
    assert "95 [90, 100]" in load_table.render_table([row])
    assert load_table.render_remarks([row]) == ""
    assert curves.sustained_curve(row, "tail_s") == [(80.0, 0.08), (94.0, 0.094)]


def test_a_search_without_a_limit_says_so() -> None:
    remarks = load_table.render_remarks([searched(0, None, 80.0, 160.0)])
    assert "no request was late at up to 160 requests/s: a lower bound" in remarks
    remarks = load_table.render_remarks([searched(800, None, 80.0, 40.0)])
    assert "requests were late at every rate from 40 requests/s on" in remarks


def test_bounds_that_rows_derived_from_the_loop_are_shown_with_their_range() -> None:
    row = searched(9, RateEstimate(95.0, 90.0, 100.0), 94.0)
    (one,) = row.measurements
    assert one.load is not None
    other = row_of(replace(one, load=replace(one.load, bound_s=0.12)))
    assert "with p99 <= 100-120 ms" in load_table.render_answer([row, other])


def test_single_stream_answers_with_a_latency_and_offline_with_a_throughput() -> None:
    for scenario, expected in (
        ("single_stream", "vmap has the lowest latency, p90 50 ms."),
        ("offline", "vmap processes 100 requests/s."),
    ):
        run = replace(RUN, purpose="asked", offered_qps=None)
        test = LoadTest(scenario, 90.0, None, (run,))
        answer = load_table.render_answer([row_of(Measurement(CASE, load=test))])
        assert answer.strip() == f"4 models, shared inputs: {expected}"


def test_the_picture_has_a_curve_per_strategy_and_the_bound() -> None:
    above, below = load_picture.draw([LOOP, VMAP]).axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in above.get_lines()}
    assert lines["loop"].get_xydata().tolist() == [
        [20.0, pytest.approx(10)],
        [60.0, pytest.approx(80)],
    ]
    drawn: list[Any] = list(above.get_lines())
    assert any(list(line.get_ydata()) == [pytest.approx(100)] * 2 for line in drawn)
    markers = [line.get_xydata().tolist() for line in drawn if len(line.get_xydata()) == 1]
    assert [[70.0, pytest.approx(200)]] in markers  # an invalid run is not connected
    assert below.get_xlabel() == "offered requests per second"
    assert {text.get_text() for text in above.texts} == {"loop", "vmap", "bound"}


def test_the_curve_of_a_strategy_ends_at_its_sustained_rate_and_pools_close_rates() -> None:
    row = served("vmap", (20.0, 0.01), (58.0, 0.09), (60.0, 0.05), (62.0, 0.04), sustained=60.0)
    assert curves.sustained_curve(row, "tail_s") == [(20.0, 0.01), (60.0, pytest.approx(0.07))]
    assert [rate for rate, _ in curves.latency_curve(row, "tail_s")] == [20.0, 58.0, 60.0, 62.0]
    assert curves.sustained_curve(served("vmap", (20.0, 0.01), sustained=0.0), "tail_s") == []


@pytest.mark.parametrize("rows", [[], [row_of(Measurement(CASE, "failed", "broke"))]])
def test_a_run_without_rows_or_valid_runs_is_drawn_and_described(
    rows: list[Summary], tmp_path: Path
) -> None:
    run = Run(ENVIRONMENT, with_options(CONFIG, scenario="server").plain(), tuple(rows))
    assert is_load_test(run)
    page = page_of(run, columns=False, sentences=True)
    assert (page.legacy_lines, page.answer) == ((), "No valid run.\n")
    load_picture.save(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
