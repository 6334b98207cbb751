"""Queue and batcher on a counted clock, against queueing theory; the search for a rate."""

import numpy as np
import pytest

from ensemble.bench.config import LoadOptions
from ensemble.bench.load import runs, search, simulation
from ensemble.bench.load.batching import ALONE, Way
from ensemble.bench.load.queueing_check import expected_wait_s, ideal_wait_s
from ensemble.bench.load.request_queue import Waiting
from ensemble.bench.load.sample_library import library, shares
from ensemble.bench.load.simulation import Traffic
from ensemble.statistics import queries_needed

CALL_S = 0.005
ONE = [Way(ALONE, 1, CALL_S)]


def played(traffic: Traffic, *, capacity: int = 10**9, ways: list[Way] = ONE) -> list[float | None]:
    waiting = Waiting(1, capacity)
    return simulation.latencies(traffic, ways, waiting, max_batch=1, max_wait_s=0.0)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_of_fixed_calls_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    traffic = simulation.poisson(load / CALL_S, 60_000, [1.0], np.random.default_rng(0))
    waits = [(latency or 0.0) - CALL_S for latency in played(traffic)]
    assert sum(waits) / len(waits) == pytest.approx(ideal_wait_s(traffic.times_s, CALL_S), rel=1e-6)
    assert sum(waits) / len(waits) == pytest.approx(expected_wait_s(load, CALL_S), rel=0.05)


def test_latencies_of_a_few_arrivals_by_hand() -> None:
    ways = [Way(ALONE, 1, 1.0), Way(ALONE, 2, 1.2)]
    traffic = Traffic((0.0, 0.1, 0.2, 5.0), (0, 0, 0, 0))
    assert played(traffic, ways=ways) == pytest.approx([1.0, 2.1, 2.0, 1.0])
    waited = simulation.latencies(traffic, ways, Waiting(1, 9), max_batch=2, max_wait_s=0.5)
    assert waited == pytest.approx([1.3, 1.2, 2.1, 1.5])


def test_under_overload_the_accepted_ones_wait_no_longer_than_the_queue_is() -> None:
    traffic = simulation.poisson(2 / CALL_S, 5000, [1.0], np.random.default_rng(1))
    found = played(traffic, capacity=10)
    accepted = [latency for latency in found if latency is not None]
    assert max(accepted) <= 11.001 * CALL_S
    assert len(accepted) / len(found) == pytest.approx(0.5, abs=0.03)


def test_the_guess_is_the_rate_at_which_the_tail_meets_the_bound() -> None:
    options = {"shares": [1.0], "percentile": 99, "max_batch": 1, "max_wait_s": 0.0}
    held = simulation.guess(ONE, bound_s=4 * CALL_S, **options)  # type: ignore[arg-type]
    traffic = simulation.poisson(held, 100_000, [1.0], np.random.default_rng(5))
    late = [latency for latency in played(traffic) if latency is not None and latency > 4 * CALL_S]
    assert len(late) / 100_000 == pytest.approx(0.01, abs=0.006)


def test_a_run_of_twenty_bounds_shows_a_rate_that_a_short_run_lets_pass() -> None:
    bound_s, rate = 40 * CALL_S, 1.08 / CALL_S
    tails = []
    for bounds in (1.0, runs.BOUNDS_LONG):
        count = int(bounds * bound_s * rate)
        traffic = simulation.poisson(rate, count, [1.0], np.random.default_rng(0))
        tails.append(np.percentile([latency or 0.0 for latency in played(traffic)], 90))
    assert tails[0] <= bound_s < tails[1]


@pytest.mark.parametrize("limit", [37.0, 100.0, 290.0])
def test_the_search_finds_what_is_held_to_within_its_closeness_and_confirms_it(
    limit: float,
) -> None:
    asked: list[tuple[float, int]] = []

    def hold(rate: float, draw: int) -> bool:
        asked.append((rate, draw))
        return rate <= limit

    held = search.highest(hold, 100.0)
    assert held is not None
    assert limit / search.CLOSE <= held <= limit
    assert asked[-1] == (held, 1)


def test_a_rate_that_other_arrivals_do_not_hold_is_lowered_until_they_do() -> None:
    held = search.highest(lambda rate, draw: rate <= (100 if draw == 0 else 93), 100.0)
    assert held is not None
    assert held <= 93
    assert search.highest(lambda rate, draw: draw == 0 and rate <= 100, 100.0) is None
    assert search.highest(lambda rate, draw: False, 100.0) is None


def test_tenants_are_asked_for_by_zipf_and_every_image_is_there() -> None:
    assert shares(4, 0.0) == (0.25, 0.25, 0.25, 0.25)
    assert shares(3, 1.0) == pytest.approx((6 / 11, 3 / 11, 2 / 11))
    entries = library(16, shares(3, 1.0))
    lanes = [lane for _, lane in entries]
    assert lanes.count(0) / len(lanes) == pytest.approx(6 / 11, abs=1e-3)
    assert {image for image, lane in entries if lane == 2} == set(range(16))
    assert library(4, (1.0,)) == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert {lane for _, lane in library(16, shares(64, 10.0))} == set(range(64))


def test_what_a_search_takes_is_said_before_it_begins() -> None:
    """By the requests that a 99th percentile of which two may be late needs."""
    asked = LoadOptions(scenario="server")
    requests = queries_needed(0.99, search.LATE)
    line = search.announcement(asked, 2.0)
    assert f"at least {requests} requests and 2 s" in line
    assert f"about {8 * requests / 10 / 60:.0f} minutes at 10 requests per second" in line
    assert f"--latency_percentile 90 ({queries_needed(0.9, search.LATE)} requests)" in line
    assert "about 80 minutes" in search.announcement(asked, 600.0)
