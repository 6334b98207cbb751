"""The queue simulation against queueing theory, and the search for the sustained rate."""

import numpy as np
import pytest

from ensemble.bench.config import LoadOptions
from ensemble.bench.load import load_tester, queue_simulation, search
from ensemble.bench.load.batching import SINGLE_TENANT, BatchPlan
from ensemble.bench.load.queue_simulation import Arrivals
from ensemble.bench.load.queueing_check import lindley_mean_wait_s, mean_wait_s
from ensemble.bench.load.request_queue import RequestQueue
from ensemble.bench.load.sample_library import sample_library, tenant_shares
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


def test_the_estimate_is_the_rate_at_which_the_percentile_meets_the_bound() -> None:
    options = {"tenant_shares": [1.0], "percentile": 99, "max_batch": 1, "batching_delay_s": 0.0}
    sustained = queue_simulation.estimate_sustained_qps(UNBATCHED, bound_s=4 * SERVICE_S, **options)  # type: ignore[arg-type]
    arrivals = queue_simulation.poisson_arrivals(
        sustained, 100_000, [1.0], np.random.default_rng(5)
    )
    late = [
        latency
        for latency in latencies(arrivals)
        if latency is not None and latency > 4 * SERVICE_S
    ]
    assert len(late) / 100_000 == pytest.approx(0.01, abs=0.006)


def test_a_run_of_20_bounds_rejects_an_overload_that_a_short_run_passes() -> None:
    bound_s, rate = 40 * SERVICE_S, 1.08 / SERVICE_S
    tails = []
    for bounds in (1.0, load_tester.MIN_RUN_BOUNDS):
        count = int(bounds * bound_s * rate)
        arrivals = queue_simulation.poisson_arrivals(rate, count, [1.0], np.random.default_rng(0))
        tails.append(np.percentile([latency or 0.0 for latency in latencies(arrivals)], 90))
    assert tails[0] <= bound_s < tails[1]


@pytest.mark.parametrize("limit", [37.0, 100.0, 290.0])
def test_the_search_finds_the_sustained_rate_to_within_its_bracket_and_confirms_it(
    limit: float,
) -> None:
    tried: list[tuple[float, int]] = []

    def is_sustained(rate: float, trial: int) -> bool:
        tried.append((rate, trial))
        return rate <= limit

    sustained = search.highest_sustained_rate(is_sustained, 100.0)
    assert sustained is not None
    assert limit / search.BRACKET_RATIO <= sustained <= limit
    assert tried[-1] == (sustained, 1)


def test_a_rate_that_fails_its_confirmation_is_lowered_until_one_passes() -> None:
    sustained = search.highest_sustained_rate(
        lambda rate, trial: rate <= (100 if trial == 0 else 93), 100.0
    )
    assert sustained is not None
    assert sustained <= 93
    assert (
        search.highest_sustained_rate(lambda rate, trial: trial == 0 and rate <= 100, 100.0) is None
    )
    assert search.highest_sustained_rate(lambda rate, trial: False, 100.0) is None


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
