"""The server by itself and under LoadGen: refusals, failures and its end, each counted."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ensemble.bench.load import loadgen
from ensemble.bench.load.batching import ALONE, Batch, Way
from ensemble.bench.load.figures import record
from ensemble.bench.load.loadgen import (
    OFFLINE,
    SERVER,
    SINGLE_STREAM,
    Order,
    Ruling,
)
from ensemble.bench.load.server import Policy, Server

QUICK = Way(ALONE, 1, 1e-4)


def policy(capacity: int = 100, max_wait_s: float = 0.0, max_batch: int = 1) -> Policy:
    return Policy((QUICK, Way(ALONE, 4, 2e-4)), 1, max_batch, max_wait_s, capacity)


def right(batch: Batch) -> tuple[int, float]:
    return 0, 0.0


def wanted(*idents: int) -> list[tuple[int, int, int]]:
    return [(ident, 0, 0) for ident in idents]


class Answers(list[int]):
    """The idents that were answered, in their order."""

    def __call__(self, idents: Sequence[int]) -> None:
        self.extend(idents)


def test_those_that_wait_at_the_end_are_answered() -> None:
    answers = Answers()
    server = Server(policy(max_wait_s=60.0, max_batch=4), compute=right, answer=answers)
    server.arrive(wanted(7, 8, 9))
    server.close()
    server.serve()
    assert answers == [7, 8, 9]
    assert (server.tally.answered, server.tally.batches, server.tally.slots) == (3, 1, 4)


def test_who_finds_the_queue_full_is_counted_and_told_to_the_referee_last() -> None:
    answers = Answers()
    server = Server(policy(capacity=2), compute=right, answer=answers)
    server.arrive(wanted(1, 2, 3, 4))
    assert answers == []
    server.close()
    server.serve()
    server.finish()
    assert answers == [1, 2, 3, 4]
    tally = server.tally
    assert (tally.answered, tally.refused, tally.missed) == (2, 2, [2, 3])
    assert server.most_waiting == 2


def test_a_forward_that_raises_fails_its_requests_and_all_that_come_later() -> None:
    answers, calls = Answers(), []

    def compute(batch: Batch) -> tuple[int, float]:
        calls.append(batch.count)
        if len(calls) == 2:
            raise RuntimeError("the device is gone\nand more")
        return 0, 0.0

    server = Server(policy(), compute=compute, answer=answers)
    server.arrive(wanted(*range(9)))
    server.close()
    server.serve()
    server.arrive(wanted(9))
    assert answers == list(range(10))
    tally = server.tally
    assert (tally.answered, tally.failed) == (calls[0], 10 - calls[0])
    assert tally.errors == ["RuntimeError: the device is gone"]
    order = Order(SERVER, 10.0, 0.9, 1.0, 1.0, 10, 0)
    ruling = Ruling(True, None, (0.0,) * 10, (0.1,) * 10, 0.0, 1.0)
    run = record("asked", order, ruling, tally, 9, 1.0)
    assert not run.valid
    failed = 10 - calls[0]
    assert run.problem == f"RuntimeError: the device is gone; {failed} requests failed"


def test_wrong_answers_and_lost_requests_are_problems_and_few_requests_have_no_percentile() -> None:
    server = Server(policy(), compute=lambda batch: (1, 0.0), answer=Answers())
    server.arrive(wanted(1))
    server.close()
    server.serve()
    order = Order(SERVER, 10.0, 0.9, 1.0, 1.0, 1, 0)
    one = Ruling(True, None, (0.0,), (0.1,), 0.0, 1.0)
    run = record("asked", order, one, server.tally, 1, 1.0)
    assert run.problem == "outputs disagree under load: 1 of 1 answers"
    assert (run.p50_s, run.p99_s, run.longest_s) == (None, None, 0.1)
    server.tally.wrong = 0
    two = Ruling(True, None, (0.0,) * 2, (0.1,) * 2, 0.0, 1.0)
    lost = record("asked", order, two, server.tally, 1, 1.0)
    assert lost.problem == "expected 2 requests to be accounted for, found 1"


def test_the_wait_for_company_ends_on_time() -> None:
    answers = Answers()
    server = Server(policy(max_wait_s=0.05, max_batch=4), compute=right, answer=answers)
    server.arrive(wanted(1))
    begin = time.perf_counter()
    timer = threading.Timer(0.3, server.close)
    timer.start()
    while not answers:
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        while not answers and time.perf_counter() - begin < 5:
            time.sleep(0.002)
    assert 0.045 <= time.perf_counter() - begin < 0.3
    thread.join()
    timer.join()


@pytest.mark.parametrize("scenario", [SERVER, OFFLINE, SINGLE_STREAM])
def test_loadgen_counts_what_the_server_counts(scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen")
    asked: list[int] = []
    server = Server(policy(capacity=10**6, max_batch=4), compute=right, answer=loadgen.answer)

    def arrive(found: Sequence[tuple[int, int]]) -> None:
        asked.extend(entry for _, entry in found)
        server.arrive([(ident, entry, 0) for ident, entry in found])

    order = Order(scenario, 400.0, 0.9, 0.5, 0.1, 100, seed=3)
    play = loadgen.Play(order, arrive=arrive, finish=server.finish, entries=8, log=None)
    ruling = play.run(server.serve, server.close)
    assert len(ruling.latencies_s) == len(asked) == server.tally.answered >= 64
    assert set(asked) == set(range(8))
    assert min(ruling.latencies_s) > 0
    if scenario == SERVER:
        assert (ruling.valid, ruling.why_not) == (True, None)
        gaps = len(asked) / (ruling.arrivals_s[-1] - ruling.arrivals_s[0])
        assert gaps == pytest.approx(400, rel=0.4)


def test_a_run_that_is_too_short_for_its_percentile_is_not_valid_and_says_why(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mlperf_loadgen")
    server = Server(policy(), compute=right, answer=loadgen.answer)
    order = Order(SERVER, 400.0, 0.99, 0.5, 0.01, 20, seed=3)
    play = loadgen.Play(
        order,
        arrive=lambda found: server.arrive([(ident, 0, 0) for ident, _ in found]),
        finish=server.finish,
        entries=8,
        log=tmp_path / "log",
    )
    ruling = play.run(server.serve, server.close)
    assert not ruling.valid
    missing = 459 - len(ruling.latencies_s)
    assert ruling.why_not == f"not enough queries: {missing} more needed, all in time"
    kept = {path.name for path in (tmp_path / "log").iterdir()}
    assert {"mlperf_log_summary.txt", "mlperf_log_detail.txt"} <= kept
    assert "mlperf_log_trace.json" not in kept
