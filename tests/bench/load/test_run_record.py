"""The record of a LoadGen run, from latencies that are made up."""

import pytest

from ensemble.bench.load.loadgen import SERVER, LoadGenResult, LoadGenSettings
from ensemble.bench.load.record import LoadRun
from ensemble.bench.load.run_record import latency_percentile, make_record
from ensemble.bench.load.server import Counters

SETTINGS = LoadGenSettings(
    scenario=SERVER,
    rate_qps=50.0,
    percentile=0.9,
    bound_s=0.1,
    min_seconds=1.0,
    min_queries=100,
    seed=7,
)


def record(latencies_s: list[float], counters: Counters, *, valid: bool = True) -> LoadRun:
    result = LoadGenResult(
        valid=valid,
        invalid_reason=None if valid else "late",
        arrivals_s=tuple(0.02 * index for index in range(len(latencies_s))),
        latencies_s=tuple(latencies_s),
        max_issue_delay_s=0.001,
        seconds=4.0,
    )
    return make_record("search", SETTINGS, result, counters, max_queue_length=9, cpu_s=2.0)


def test_late_requests_are_those_after_the_bound_and_those_without_an_answer() -> None:
    """100 requests: 90 in time (five at the bound), 6 late, 3 refused, 1 failed; of the unanswered
    the latency does not count."""
    latencies = [0.05] * 85 + [0.1] * 5 + [0.2] * 6 + [0.0] * 4
    counters = Counters(answered=96, refused=3, failed=1, unanswered=[96, 97, 98, 99])
    counters.batches, counters.slots = 48, 128
    run = record(latencies, counters)
    assert (run.requests, run.answered, run.late) == (100, 96, 10)
    assert run.p50_s == 0.05
    assert run.tail_s == 0.1  # between the 86th and the 87th of 96
    assert run.longest_s == 0.2
    assert run.p99_s is None  # 459 requests are needed
    assert run.mean_batch == 2.0
    assert run.wasted_share == 0.25
    assert run.cpu_s_per_request == pytest.approx(2.0 / 96)
    assert run.most_waiting == 9
    assert (run.valid, run.problem) == (True, None)


def test_wrong_answers_and_requests_that_are_lost_are_problems() -> None:
    wrong = record([0.05] * 100, Counters(answered=100, wrong=2))
    assert not wrong.valid
    assert wrong.problem == "outputs disagree under load: 2 of 100 answers"
    lost = record([0.05] * 100, Counters(answered=99))
    assert lost.problem == "expected 100 requests to be accounted for, got 99"
    broken = record([0.05] * 100, Counters(answered=90, failed=10, errors=["it broke"]))
    assert broken.problem == "it broke; 10 requests failed"


def test_a_run_that_loadgen_calls_invalid_keeps_its_reason() -> None:
    run = record([0.2] * 100, Counters(answered=100), valid=False)
    assert (run.valid, run.why_not, run.late) == (False, "late", 100)


def test_a_percentile_needs_enough_requests() -> None:
    assert latency_percentile([0.1] * 43, 0.9) is None
    assert latency_percentile([0.1] * 44, 0.9) == pytest.approx(0.1)
