"""Results under load in sentences, in the table and in the picture, by values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble.bench.load.record import LoadRun, LoadTest, held_range
from ensemble.bench.measurement import Measurement
from ensemble.bench.report import curves, load_picture, load_table
from ensemble.bench.report.page import is_under_load, page_of
from ensemble.bench.summary import Run, Summary
from tests.made import CASE, CONFIG, ENVIRONMENT, row_of, with_options

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


def served(strategy: str, *points: tuple[float, float], held: float, inputs: str = "shared") -> Any:
    """A row whose server was played at (rate, tail in s), and holds a rate of them."""
    runs = tuple(
        replace(
            RUN,
            purpose="confirm" if rate == held else "curve",
            offered_qps=rate,
            tail_s=tail,
            valid=rate <= held,
            why_not=None if rate <= held else "late",
        )
        for rate, tail in points
    )
    case = replace(CASE, strategy=strategy, inputs=inputs)
    test = LoadTest("server", 99.0, 0.1, runs)
    return row_of(Measurement(case, build_s=1.0, first_call_s=0.5, load=test))


LOOP = served("loop", (20.0, 0.010), (60.0, 0.08), (70.0, 0.2), held=60.0, inputs="per_model")
VMAP = served("vmap", (30.0, 0.030), (90.0, 0.05), (110.0, 0.3), held=90.0, inputs="per_model")


def test_the_answer_names_whom_to_serve_with_and_where_that_changes() -> None:
    answer = load_table.render_answer([LOOP, VMAP])
    assert answer.splitlines()[0] == (
        "4 models, per-model inputs: vmap sustains 90 requests/s with p99 <= 100 ms; loop 60."
    )
    # loop: 10 + 1.75 (rate - 20) ms; vmap: 30 + (rate - 30) / 3 ms, 5 % sooner from 32.9 on.
    first, second = curves.changes([LOOP, VMAP])
    assert (first.strategy, second.strategy) == ("loop", "vmap")
    assert second.from_qps == pytest.approx(32.9, abs=0.4)
    assert "loop up to 33" in answer.splitlines()[1]


def test_one_strategy_at_every_load_is_said_so() -> None:
    slow = served("vmap", (20.0, 0.05), (50.0, 0.09), held=50.0)
    answer = load_table.render_answer([served("loop", (20.0, 0.01), (60.0, 0.05), held=60.0), slow])
    assert answer.splitlines()[1] == "Lowest p99 at every rate: loop."


def test_a_row_that_holds_nothing_has_no_rate_and_a_reason() -> None:
    none = served("vmap", (30.0, 0.3), held=0.0)
    assert curves.held_qps(none) is None
    assert load_table.render_answer([none]).strip().endswith("no strategy had a valid run.")
    assert "vmap, 4 models: not valid: late" in load_table.render_remarks([none])
    refused = replace(RUN, refused=7, most_waiting=9)
    test = LoadTest("server", 99.0, 0.1, (replace(refused, valid=True),))
    said = load_table.render_remarks([row_of(Measurement(CASE, load=test))])
    assert "7 of 800 requests were refused" in said


def test_the_table_has_the_figures_of_the_run_that_is_shown() -> None:
    table = load_table.render_table([LOOP, VMAP])
    (line,) = [line for line in table.splitlines() if line.startswith("vmap")]
    figures = "vmap 4 90 20.0 30.0 50.0 1.50 25% 4.0 0.10 1.5"
    assert line.split() == figures.split()


def test_the_row_shows_the_process_in_the_middle() -> None:
    rates = (80.0, 100.0, 90.0)
    row = row_of(*(served("vmap", (rate, 0.05), held=rate).processes[0] for rate in rates))
    assert (curves.held_qps(row), held_range(row.load_tests)) == (90.0, (80.0, 100.0))
    assert "90 [80, 100]" in load_table.render_table([row])


def test_single_stream_and_offline_say_what_was_done() -> None:
    for scenario, said in (
        ("single_stream", "vmap has the lowest latency, p90 50 ms."),
        ("offline", "vmap processes 100 requests/s."),
    ):
        run = replace(RUN, purpose="asked", offered_qps=None)
        test = LoadTest(scenario, 90.0, None, (run,))
        answer = load_table.render_answer([row_of(Measurement(CASE, load=test))])
        assert answer.strip() == f"4 models, shared inputs: {said}"


def test_the_picture_has_a_line_a_strategy_and_the_bound() -> None:
    above, below = load_picture.draw([LOOP, VMAP]).axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in above.get_lines()}
    assert lines["loop"].get_xydata().tolist() == [
        [20.0, pytest.approx(10)],
        [60.0, pytest.approx(80)],
        [70.0, pytest.approx(200)],
    ]
    drawn: list[Any] = list(above.get_lines())
    assert any(list(line.get_ydata()) == [pytest.approx(100)] * 2 for line in drawn)
    assert below.get_xlabel() == "offered requests per second"
    assert {text.get_text() for text in above.texts} == {"loop", "vmap", "bound"}


@pytest.mark.parametrize("rows", [[], [row_of(Measurement(CASE, "failed", "broke"))]])
def test_a_run_with_nothing_in_it_is_drawn_and_told_too(
    rows: list[Summary], tmp_path: Path
) -> None:
    run = Run(ENVIRONMENT, with_options(CONFIG, scenario="server").plain(), tuple(rows))
    assert is_under_load(run)
    page = page_of(run, columns=False, sentences=True)
    assert (page.known, page.answer) == ((), "No valid run.\n")
    load_picture.save(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
