"""The server alone and under LoadGen: refusals, failures and shutdown, each counted."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ensemble.bench.load import loadgen
from ensemble.bench.load.batching import SINGLE_TENANT, Batch, BatchPlan
from ensemble.bench.load.loadgen import (
    OFFLINE,
    SERVER,
    SINGLE_STREAM,
    LoadGenResult,
    LoadGenSettings,
)
from ensemble.bench.load.run_record import make_record
from ensemble.bench.load.server import BatchingPolicy, Server

QUICK = BatchPlan(SINGLE_TENANT, 1, 1e-4)


def policy(
    capacity: int = 100, batching_delay_s: float = 0.0, max_batch: int = 1
) -> BatchingPolicy:
    return BatchingPolicy(
        (QUICK, BatchPlan(SINGLE_TENANT, 4, 2e-4)), 1, max_batch, batching_delay_s, capacity
    )


def execute_correctly(batch: Batch) -> tuple[int, float]:
    return 0, 0.0


def samples(*sample_ids: int) -> list[tuple[int, int, int]]:
    return [(sample_id, 0, 0) for sample_id in sample_ids]


class Completed(list[int]):
    """The sample ids that were completed, in order."""

    def __call__(self, sample_ids: Sequence[int]) -> None:
        self.extend(sample_ids)


def test_queued_requests_are_answered_after_stop() -> None:
    completed = Completed()
    server = Server(
        policy(batching_delay_s=60.0, max_batch=4), execute=execute_correctly, complete=completed
    )
    server.issue(samples(7, 8, 9))
    server.stop()
    server.serve()
    assert completed == [7, 8, 9]
    assert (server.counters.answered, server.counters.batches, server.counters.slots) == (3, 1, 4)


def test_a_refused_request_is_counted_and_completed_last() -> None:
    completed = Completed()
    server = Server(policy(capacity=2), execute=execute_correctly, complete=completed)
    server.issue(samples(1, 2, 3, 4))
    assert completed == []
    server.stop()
    server.serve()
    server.flush()
    assert completed == [1, 2, 3, 4]
    counters = server.counters
    assert (counters.answered, counters.refused, counters.unanswered) == (2, 2, [2, 3])
    assert server.max_queue_length == 2


def test_a_forward_that_raises_fails_its_requests_and_all_later_ones() -> None:
    completed, calls = Completed(), []

    def execute(batch: Batch) -> tuple[int, float]:
        calls.append(batch.num_requests)
        if len(calls) == 2:
            raise RuntimeError("the device is gone\nand more")
        return 0, 0.0

    server = Server(policy(), execute=execute, complete=completed)
    server.issue(samples(*range(9)))
    server.stop()
    server.serve()
    server.issue(samples(9))
    assert completed == list(range(10))
    counters = server.counters
    assert (counters.answered, counters.failed) == (calls[0], 10 - calls[0])
    assert counters.errors == ["RuntimeError: the device is gone"]
    settings = LoadGenSettings(SERVER, 10.0, 0.9, 1.0, 1.0, 10, 0)
    result = LoadGenResult(True, None, (0.0,) * 10, (0.1,) * 10, 0.0, 1.0)
    run = make_record("asked", settings, result, counters, 9, 1.0)
    assert not run.valid
    failed = 10 - calls[0]
    assert run.problem == f"RuntimeError: the device is gone; {failed} requests failed"


def test_wrong_answers_and_lost_requests_are_problems_and_few_requests_have_no_percentile() -> None:
    server = Server(policy(), execute=lambda batch: (1, 0.0), complete=Completed())
    server.issue(samples(1))
    server.stop()
    server.serve()
    settings = LoadGenSettings(SERVER, 10.0, 0.9, 1.0, 1.0, 1, 0)
    one = LoadGenResult(True, None, (0.0,), (0.1,), 0.0, 1.0)
    run = make_record("asked", settings, one, server.counters, 1, 1.0)
    assert run.problem == "outputs disagree under load: 1 of 1 answers"
    assert (run.p50_s, run.p99_s, run.longest_s) == (None, None, 0.1)
    server.counters.wrong = 0
    two = LoadGenResult(True, None, (0.0,) * 2, (0.1,) * 2, 0.0, 1.0)
    lost = make_record("asked", settings, two, server.counters, 1, 1.0)
    assert lost.problem == "expected 2 requests to be accounted for, got 1"


def test_the_batching_delay_ends_on_time() -> None:
    completed = Completed()
    server = Server(
        policy(batching_delay_s=0.05, max_batch=4), execute=execute_correctly, complete=completed
    )
    server.issue(samples(1))
    begin = time.perf_counter()
    timer = threading.Timer(0.3, server.stop)
    timer.start()
    while not completed:
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        while not completed and time.perf_counter() - begin < 5:
            time.sleep(0.002)
    assert 0.045 <= time.perf_counter() - begin < 0.3
    thread.join()
    timer.join()


@pytest.mark.parametrize("scenario", [SERVER, OFFLINE, SINGLE_STREAM])
def test_loadgen_counts_what_the_server_counts(scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen")
    drawn: list[int] = []
    server = Server(
        policy(capacity=10**6, max_batch=4), execute=execute_correctly, complete=loadgen.complete
    )

    def issue_query(arrived: Sequence[tuple[int, int]]) -> None:
        drawn.extend(index for _, index in arrived)
        server.issue([(sample_id, index, 0) for sample_id, index in arrived])

    settings = LoadGenSettings(scenario, 400.0, 0.9, 0.5, 0.1, 100, seed=3)
    session = loadgen.LoadGenSession(
        settings, issue_query=issue_query, flush_queries=server.flush, num_samples=8, log_dir=None
    )
    result = session.run(server.serve, server.stop)
    assert len(result.latencies_s) == len(drawn) == server.counters.answered >= 64
    assert set(drawn) == set(range(8))
    assert min(result.latencies_s) > 0
    if scenario == SERVER:
        assert (result.valid, result.invalid_reason) == (True, None)
        rate = len(drawn) / (result.arrivals_s[-1] - result.arrivals_s[0])
        assert rate == pytest.approx(400, rel=0.4)


def test_a_run_too_short_for_its_percentile_is_invalid_with_the_reason(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlperf_loadgen")
    server = Server(policy(), execute=execute_correctly, complete=loadgen.complete)
    settings = LoadGenSettings(SERVER, 400.0, 0.99, 0.5, 0.01, 20, seed=3)
    session = loadgen.LoadGenSession(
        settings,
        issue_query=lambda arrived: server.issue([(sample_id, 0, 0) for sample_id, _ in arrived]),
        flush_queries=server.flush,
        num_samples=8,
        log_dir=tmp_path / "log",
    )
    result = session.run(server.serve, server.stop)
    assert not result.valid
    missing = 459 - len(result.latencies_s)
    assert result.invalid_reason == f"not enough queries: {missing} more needed, all in time"
    kept = {path.name for path in (tmp_path / "log").iterdir()}
    assert {"mlperf_log_summary.txt", "mlperf_log_detail.txt"} <= kept
    assert "mlperf_log_trace.json" not in kept
