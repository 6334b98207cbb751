"""The request queue and the batcher by value: order, capacity, plan selection, no loss."""

import random

import pytest

from ensemble.bench.load.batching import (
    ALL_TENANTS,
    SINGLE_TENANT,
    BatchPlan,
    batch_sizes,
    dispatch_time_s,
    next_batch,
    peak_throughput_qps,
    select_plan,
)
from ensemble.bench.load.request_queue import Request, RequestQueue


def request(number: int, tenant: int = 0, arrival_s: float = 0.0) -> Request:
    return Request(100 + number, number, number % 3, tenant, arrival_s)


def queue_of(*tenants: int, capacity: int = 99) -> RequestQueue:
    """A queue of requests that arrived in this order, of these tenants."""
    queue = RequestQueue(3, capacity)
    for number, tenant in enumerate(tenants):
        assert queue.offer(request(number, tenant, arrival_s=float(number)))
    return queue


def numbers(parts: object) -> list[list[int]]:
    return [[one.sequence_number for one in tenant] for tenant in parts]  # type: ignore[attr-defined]


def test_requests_are_popped_first_in_first_out_and_others_stay_queued() -> None:
    queue = queue_of(1, 0, 1, 1)
    assert queue.lengths() == [1, 3, 0]
    assert numbers(queue.pop([1], 2)) == [[0, 2]]
    assert queue.lengths() == [1, 1, 0]
    assert queue.oldest() == request(1, 0, 1.0)
    assert numbers(queue.pop([0, 1, 2], 5)) == [[1], [3], []]
    assert (len(queue), queue.oldest(), queue.max_length) == (0, None, 4)


def test_a_full_queue_refuses_requests_until_one_is_popped() -> None:
    queue = RequestQueue(1, 2)
    assert [queue.offer(request(n)) for n in range(4)] == [True, True, False, False]
    queue.pop([0], 1)
    assert queue.offer(request(4))
    assert numbers(queue.pop([0], 9)) == [[1, 4]]


def test_a_queue_without_capacity_or_tenants_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0, 5"):
        RequestQueue(0, 5)


def test_no_request_is_lost_or_served_twice_in_1000_random_steps() -> None:
    draw, queue, expected, found = random.Random(0), RequestQueue(3, 7), [], []
    plans = [
        BatchPlan(SINGLE_TENANT, 1, 1.0),
        BatchPlan(SINGLE_TENANT, 2, 1.5),
        BatchPlan(ALL_TENANTS, 2, 3.0),
    ]
    for number in range(1000):
        if queue.offer(request(number, draw.randrange(3))):
            expected.append(number)
        if len(queue) and draw.random() < 0.4:
            found += [
                one.sequence_number
                for tenant in next_batch(queue, plans).requests
                for one in tenant
            ]
    while len(queue):
        found += [
            one.sequence_number for tenant in next_batch(queue, plans).requests for one in tenant
        ]
    assert sorted(found) == expected
    assert queue.max_length == 7


def test_batch_sizes_are_powers_of_two_and_the_maximum() -> None:
    assert [batch_sizes(n) for n in (1, 2, 4, 6)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 6)]


def test_the_plan_with_the_least_time_per_answered_request_is_selected() -> None:
    one, two, four = (
        BatchPlan(SINGLE_TENANT, 1, 1.0),
        BatchPlan(SINGLE_TENANT, 2, 1.6),
        BatchPlan(SINGLE_TENANT, 4, 2.2),
    )
    plans = [one, two, four]
    assert select_plan(plans, [1], 0) == one
    assert select_plan(plans, [2], 0) == two
    assert select_plan(plans, [3], 0) == four  # 2.2 for three, though one slot is empty
    even = [one, BatchPlan(SINGLE_TENANT, 2, 2.0)]
    assert select_plan(even, [9], 0) == one  # no larger batch where it saves nothing


def test_a_hybrid_serves_one_tenant_of_few_and_all_tenants_of_many() -> None:
    single, combined = BatchPlan(SINGLE_TENANT, 1, 1.0), BatchPlan(ALL_TENANTS, 1, 2.5)
    assert select_plan([single, combined], [1, 1, 0, 0], 0) == single
    assert select_plan([single, combined], [1, 1, 1, 0], 0) == combined


def test_an_all_tenant_batch_serves_every_tenant_and_counts_empty_slots() -> None:
    queue = queue_of(2, 0, 2, 2)
    batch = next_batch(queue, [BatchPlan(ALL_TENANTS, 2, 1.0)])
    assert batch.tenants == (0, 1, 2)
    assert numbers(batch.requests) == [[1], [], [0, 2]]
    assert (batch.num_requests, batch.num_slots, queue.lengths()) == (3, 6, [0, 0, 1])


def test_a_single_tenant_batch_serves_the_tenant_with_the_oldest_request() -> None:
    batch = next_batch(queue_of(1, 0, 1), [BatchPlan(SINGLE_TENANT, 2, 1.0)])
    assert (batch.tenants, numbers(batch.requests), batch.num_slots) == ((1,), [[0, 2]], 2)


def test_requests_are_dispatched_at_once_unless_there_is_a_batching_delay() -> None:
    queue = queue_of(0)
    assert dispatch_time_s(queue, max_batch=2, batching_delay_s=0.0) == 0.0
    assert dispatch_time_s(queue, max_batch=2, batching_delay_s=0.5) == 0.5
    assert dispatch_time_s(queue_of(0, 0), max_batch=2, batching_delay_s=0.5) == 0.0
    assert dispatch_time_s(RequestQueue(1, 1), max_batch=2, batching_delay_s=0.5) is None
    with pytest.raises(ValueError, match="got none"):
        next_batch(RequestQueue(1, 1), [BatchPlan(SINGLE_TENANT, 1, 1.0)])


def test_the_peak_throughput_fills_every_slot() -> None:
    assert (
        peak_throughput_qps(
            [BatchPlan(SINGLE_TENANT, 2, 1.0), BatchPlan(ALL_TENANTS, 1, 1.0)], num_tenants=3
        )
        == 3.0
    )
