"""The queue simulation against queueing theory, and the search for the sustained rate."""

import numpy as np
import pytest

from ensemble.bench.config import LoadOptions
from ensemble.bench.load import load_tester, queue_simulation, search
from ensemble.bench.load.batching import SINGLE_TENANT, BatchPlan
from ensemble.bench.load.queue_simulation import Arrivals, Queueing
from ensemble.bench.load.queueing_check import lindley_mean_wait_s, mean_wait_s
from ensemble.bench.load.request_queue import RequestQueue
from ensemble.bench.load.sample_library import sample_library, tenant_shares
from ensemble.bench.load.search import LateCurve, Outcome
from ensemble.statistics import queries_needed

SERVICE_S = 0.005
UNBATCHED = [BatchPlan(SINGLE_TENANT, 1, SERVICE_S)]


def latencies(
    arrivals: Arrivals, *, capacity: int = 10**9, plans: list[BatchPlan] = UNBATCHED
) -> list[float | None]:
    queue = RequestQueue(1, capacity)
    return queue_simulation.simulate(arrivals, plans, queue, max_batch=1, batching_delay_s=0.0)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_mean_wait_of_an_m_d_1_queue_is_that_of_pollaczek_and_khinchine(load: float) -> None:
    arrivals = queue_simulation.poisson_arrivals(
        load / SERVICE_S, 60_000, [1.0], np.random.default_rng(0)
    )
    waits = [(latency or 0.0) - SERVICE_S for latency in latencies(arrivals)]
    assert sum(waits) / len(waits) == pytest.approx(
        lindley_mean_wait_s(arrivals.times_s, SERVICE_S), rel=1e-6
    )
    assert sum(waits) / len(waits) == pytest.approx(mean_wait_s(load, SERVICE_S), rel=0.05)


def test_latencies_of_four_arrivals_by_hand() -> None:
    plans = [BatchPlan(SINGLE_TENANT, 1, 1.0), BatchPlan(SINGLE_TENANT, 2, 1.2)]
    arrivals = Arrivals((0.0, 0.1, 0.2, 5.0), (0, 0, 0, 0))
    assert latencies(arrivals, plans=plans) == pytest.approx([1.0, 2.1, 2.0, 1.0])
    waited = queue_simulation.simulate(
        arrivals, plans, RequestQueue(1, 9), max_batch=2, batching_delay_s=0.5
    )
    assert waited == pytest.approx([1.3, 1.2, 2.1, 1.5])


def test_under_overload_the_queue_capacity_bounds_the_latency() -> None:
    arrivals = queue_simulation.poisson_arrivals(
        2 / SERVICE_S, 5000, [1.0], np.random.default_rng(1)
    )
    found = latencies(arrivals, capacity=10)
    accepted = [latency for latency in found if latency is not None]
    assert max(accepted) <= 11.001 * SERVICE_S
    assert len(accepted) / len(found) == pytest.approx(0.5, abs=0.03)


def test_the_curve_has_the_share_of_late_requests_at_and_around_the_sustained_rate() -> None:
    queueing = Queueing(tuple(UNBATCHED), (1.0,), 1, 0.0, 4 * SERVICE_S)
    curve = queue_simulation.late_curve(queueing, percentile=90, requests_at=lambda rate: 400)
    assert list(curve.shares) == sorted(curve.shares)
    for rate in (curve.sustained_qps, curve.rates_qps[3], curve.rates_qps[-1]):
        arrivals_of_runs = [
            queue_simulation.poisson_arrivals(rate, 400, [1.0], np.random.default_rng(100 + seed))
            for seed in range(100)
        ]
        late = [
            (latency or 0.0) > 4 * SERVICE_S
            for one in arrivals_of_runs
            for latency in latencies(one)
        ]
        expected = float(curve.share(np.array([rate]))[0])
        assert sum(late) / len(late) == pytest.approx(expected, rel=0.35)  # bursts
    (at_sustained,) = curve.share(np.array([curve.sustained_qps]))
    assert at_sustained == pytest.approx(0.1, rel=0.25)  # less: a run begins with an empty queue


def test_a_run_of_20_bounds_rejects_an_overload_that_a_short_run_passes() -> None:
    bound_s, rate = 40 * SERVICE_S, 1.08 / SERVICE_S
    tails = []
    for bounds in (1.0, load_tester.MIN_RUN_BOUNDS):
        count = int(bounds * bound_s * rate)
        arrivals = queue_simulation.poisson_arrivals(rate, count, [1.0], np.random.default_rng(0))
        tails.append(np.percentile([latency or 0.0 for latency in latencies(arrivals)], 90))
    assert tails[0] <= bound_s < tails[1]


CURVE = LateCurve((50.0, 100.0, 200.0), (0.001, 0.01, 0.5), 100.0)


def test_the_capacity_is_that_for_which_the_curve_expects_the_late_requests_that_there_were() -> (
    None
):
    """A server of 1.5 times the capacity has at 150 requests per second what the curve has at 100:
    one late in 100; at 300 one in two."""
    runs = [Outcome(150.0, 1000, 10), Outcome(300.0, 1000, 500)]
    capacity = search.fit_capacity(CURVE, runs)
    assert capacity is not None
    assert np.exp(capacity) == pytest.approx(1.5, rel=1e-3)
    assert search.fit_capacity(CURVE, [Outcome(100.0, 1000, 0)]) is None
    assert search.fit_capacity(CURVE, [Outcome(100.0, 1000, 1000)]) is None


def test_the_interval_of_an_estimate_is_a_jackknife_over_runs() -> None:
    runs = [Outcome(100.0, 1000, late) for late in (10, 14, 7, 9)]
    found = search.estimate(CURVE, runs)
    assert found is not None
    parts = [
        search.fit_capacity(CURVE, [*runs[:index], *runs[index + 1 :]]) or 0.0 for index in range(4)
    ]
    error = (3 / 4 * sum((part - np.mean(parts)) ** 2 for part in parts)) ** 0.5
    assert np.log(found.high_qps / found.qps) == pytest.approx(3.182 * error, rel=1e-3)  # t of 3
    assert np.log(found.qps / found.low_qps) == pytest.approx(3.182 * error, rel=1e-3)


def test_a_search_follows_the_estimate_with_new_arrivals_in_every_run() -> None:
    tried: list[tuple[float, int]] = []

    def run(rate: float, trial: int) -> Outcome:
        """A server of twice the capacity of the simulated one."""
        tried.append((rate, trial))
        return Outcome(rate, 1000, round(1000 * float(CURVE.share(np.array([rate / 2]))[0])))

    found = search.search_rate(run, CURVE)
    assert found is not None
    assert found.qps == pytest.approx(200.0, rel=0.05)
    assert [trial for _, trial in tried] == list(range(1, 1 + search.RUNS))
    assert tried[0][0] == 100.0
    assert max(rate for rate, _ in tried) < 2.2 * 100


def test_a_search_ends_where_every_rate_holds_and_where_none_does() -> None:
    for late, factor in ((0, 2.0), (1000, 0.5)):
        tried: list[float] = []

        def run(rate: float, trial: int, late: int = late, tried: list[float] = tried) -> Outcome:
            tried.append(rate)
            return Outcome(rate, 1000, late)

        assert search.search_rate(run, CURVE) is None
        assert len(tried) == search.MAX_RUNS
        assert (tried[-1] > factor * tried[0]) is (late == 0)


def test_samples_follow_zipfs_law_over_tenants_and_cover_every_image() -> None:
    assert tenant_shares(4, 0.0) == (0.25, 0.25, 0.25, 0.25)
    assert tenant_shares(3, 1.0) == pytest.approx((6 / 11, 3 / 11, 2 / 11))
    samples = sample_library(16, tenant_shares(3, 1.0))
    tenants = [tenant for _, tenant in samples]
    assert tenants.count(0) / len(tenants) == pytest.approx(6 / 11, abs=1e-3)
    assert {image for image, tenant in samples if tenant == 2} == set(range(16))
    assert sample_library(4, (1.0,)) == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert {tenant for _, tenant in sample_library(16, tenant_shares(64, 10.0))} == set(range(64))


def test_the_duration_of_a_search_is_announced() -> None:
    """From the requests that a 99th percentile needs if two of them are late."""
    asked = LoadOptions(scenario="server")
    requests = queries_needed(0.99, search.LATE_REQUESTS)
    line = search.announcement(asked, 2.0)
    assert f"at least {requests} requests and 2 s" in line
    assert f"about {8 * requests / 10 / 60:.0f} minutes at 10 requests per second" in line
    assert f"--latency_percentile 90 ({queries_needed(0.9, search.LATE_REQUESTS)} requests)" in line
    assert "about 80 minutes" in search.announcement(asked, 600.0)
