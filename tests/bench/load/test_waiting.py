"""The queue and the batcher, by values: order, bounds, choices, nothing lost."""

import random

import pytest

from ensemble.bench.load.batching import (
    ALONE,
    TOGETHER,
    Way,
    choose,
    most_per_second,
    ready_s,
    sizes,
    take,
)
from ensemble.bench.load.request_queue import Request, Waiting


def request(number: int, lane: int = 0, arrived_s: float = 0.0) -> Request:
    return Request(100 + number, number, number % 3, lane, arrived_s)


def full(*lanes: int, capacity: int = 99) -> Waiting:
    """Requests that came in this order, for these lanes."""
    waiting = Waiting(3, capacity)
    for number, lane in enumerate(lanes):
        assert waiting.offer(request(number, lane, arrived_s=float(number)))
    return waiting


def numbers(taken: object) -> list[list[int]]:
    return [[one.number for one in lane] for lane in taken]  # type: ignore[attr-defined]


def test_who_came_first_is_taken_first_and_others_keep_waiting() -> None:
    waiting = full(1, 0, 1, 1)
    assert waiting.counts() == [1, 3, 0]
    assert numbers(waiting.take([1], 2)) == [[0, 2]]
    assert waiting.counts() == [1, 1, 0]
    assert waiting.oldest() == request(1, 0, 1.0)
    assert numbers(waiting.take([0, 1, 2], 5)) == [[1], [3], []]
    assert (len(waiting), waiting.oldest(), waiting.most) == (0, None, 4)


def test_a_full_queue_refuses_until_somebody_is_taken() -> None:
    waiting = Waiting(1, 2)
    assert [waiting.offer(request(n)) for n in range(4)] == [True, True, False, False]
    waiting.take([0], 1)
    assert waiting.offer(request(4))
    assert numbers(waiting.take([0], 9)) == [[1, 4]]


def test_a_queue_without_room_or_lanes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0, 5"):
        Waiting(0, 5)


def test_nothing_is_lost_and_nothing_comes_twice_in_a_thousand_random_steps() -> None:
    draw, waiting, expected, found = random.Random(0), Waiting(3, 7), [], []
    ways = [Way(ALONE, 1, 1.0), Way(ALONE, 2, 1.5), Way(TOGETHER, 2, 3.0)]
    for number in range(1000):
        if waiting.offer(request(number, draw.randrange(3))):
            expected.append(number)
        if len(waiting) and draw.random() < 0.4:
            found += [one.number for lane in take(waiting, ways).requests for one in lane]
    while len(waiting):
        found += [one.number for lane in take(waiting, ways).requests for one in lane]
    assert sorted(found) == expected
    assert waiting.most == 7


def test_batch_sizes_are_powers_of_two_and_the_largest_itself() -> None:
    assert [sizes(n) for n in (1, 2, 4, 6)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 6)]


def test_the_way_with_the_least_time_for_each_answer_is_taken() -> None:
    one, two, four = Way(ALONE, 1, 1.0), Way(ALONE, 2, 1.6), Way(ALONE, 4, 2.2)
    ways = [one, two, four]
    assert choose(ways, [1], 0) == one
    assert choose(ways, [2], 0) == two
    assert choose(ways, [3], 0) == four  # 2.2 for three, though one slot is empty
    even = [one, Way(ALONE, 2, 2.0)]
    assert choose(even, [9], 0) == one  # no company where it saves nothing


def test_a_hybrid_loops_over_few_and_takes_all_when_many_wait() -> None:
    alone, together = Way(ALONE, 1, 1.0), Way(TOGETHER, 1, 2.5)
    assert choose([alone, together], [1, 1, 0, 0], 0) == alone
    assert choose([alone, together], [1, 1, 1, 0], 0) == together


def test_together_takes_from_every_lane_and_counts_empty_slots() -> None:
    waiting = full(2, 0, 2, 2)
    batch = take(waiting, [Way(TOGETHER, 2, 1.0)])
    assert batch.lanes == (0, 1, 2)
    assert numbers(batch.requests) == [[1], [], [0, 2]]
    assert (batch.count, batch.slots, waiting.counts()) == (3, 6, [0, 0, 1])


def test_alone_takes_the_lane_that_waits_longest() -> None:
    batch = take(full(1, 0, 1), [Way(ALONE, 2, 1.0)])
    assert (batch.lanes, numbers(batch.requests), batch.slots) == ((1,), [[0, 2]], 2)


def test_nobody_waits_for_company_unless_told_to() -> None:
    waiting = full(0)
    assert ready_s(waiting, max_batch=2, max_wait_s=0.0) == 0.0
    assert ready_s(waiting, max_batch=2, max_wait_s=0.5) == 0.5
    assert ready_s(full(0, 0), max_batch=2, max_wait_s=0.5) == 0.0
    assert ready_s(Waiting(1, 1), max_batch=2, max_wait_s=0.5) is None
    with pytest.raises(ValueError, match="found none"):
        take(Waiting(1, 1), [Way(ALONE, 1, 1.0)])


def test_the_most_per_second_fills_every_slot() -> None:
    assert most_per_second([Way(ALONE, 2, 1.0), Way(TOGETHER, 1, 1.0)], lanes=3) == 3.0
