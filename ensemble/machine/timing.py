"""Time functions against each other in interleaved rounds. Knows nothing of models.

The calls of a round run in an order drawn anew, always the same for the same number of
functions: a drift of the machine's speed, and whatever being second costs, then fall on all
alike. Drawn and not alternating, because a period of two locks in with what the allocator and
the caches repeat: two identical loops, alternated, differed by 2.2 % from process to process
(deviation of the median ratio of 20 rounds), drawn by 0.9 %.

Before each timed call the same function runs untimed for at least `SETTLE_S`, so that it meets
the state that its own kind leaves, as it does when serving: OpenMP's threads spin for some 5 ms
after the last parallel loop, and slowed a strategy with threads of its own from 46 to 54 ms
(N=4) when the loop had run just before it. A function that takes `LONG_S` or more rests for
`SETTLE_S` instead: the threads then sleep, and what the caches lack is little beside its time
(16 ResNet-18: within 1 % for three strategies, 4 % for the loop, of the time after a call).
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ensemble.machine import memory

Clock = Callable[[], float]

SETTLE_S = 0.01  # twice as long as the threads of libgomp spin here before they sleep
LONG_S = 0.2


@dataclass(frozen=True)
class Sample:
    """One timed call: its seconds, and the page faults that it took (None where not counted)."""

    seconds: float
    page_faults: int | None


def time_call(
    function: Callable[[], object],
    *,
    synchronize: Callable[[], None],
    clock: Clock = time.perf_counter,
    page_faults: Callable[[], int | None] = memory.page_faults,
) -> Sample:
    """Time one call, from an idle device to an idle device.

    Left out: the wait for work queued before, counting page faults, and freeing the result.
    """
    synchronize()
    faults_before = page_faults()
    start = clock()
    result = function()
    synchronize()
    seconds = clock() - start
    faults = page_faults()
    del result
    if faults is None or faults_before is None:
        return Sample(seconds, None)
    return Sample(seconds, faults - faults_before)


def interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    warmup: int,
    min_rounds: int,
    min_seconds: float,
    synchronize: Callable[[], None],
    ready: Sequence[Callable[[], None]] | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    page_faults: Callable[[], int | None] = memory.page_faults,
) -> Iterator[tuple[Sample, ...]]:
    """Yield rounds; in each, every function is timed once, in a drawn order; see the module.

    A round's samples stand in the order of `functions`.
    Every function first runs `warmup` times, untimed. Ends after at least `min_rounds` rounds and
    `min_seconds` seconds. Before each call of a function its `ready` is called, where there are
    any, and is not timed.
    """
    before = ready or [lambda: None for _ in functions]
    untimed = [partial(_one_after_another, *both) for both in zip(before, functions, strict=True)]
    for call in untimed:
        for _ in range(warmup):
            call()
    timed = partial(time_call, synchronize=synchronize, clock=clock, page_faults=page_faults)
    begin, rounds, last = clock(), 0, dict[int, float]()
    order, draw = list(range(len(functions))), random.Random(0)
    while rounds < min_rounds or clock() - begin < min_seconds:
        draw.shuffle(order)
        samples = {}
        for index in order:
            if last.get(index, 0.0) >= LONG_S:
                sleep(SETTLE_S)
            else:
                _settle(untimed[index], synchronize, clock)
            before[index]()
            samples[index] = timed(functions[index])
            last[index] = samples[index].seconds
        yield tuple(samples[index] for index in range(len(functions)))
        rounds += 1


def _one_after_another(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def _settle(function: Callable[[], object], synchronize: Callable[[], None], clock: Clock) -> None:
    """Call a function, untimed, until `SETTLE_S` are over."""
    settled = clock() + SETTLE_S
    while True:
        function()
        synchronize()
        if clock() >= settled:
            return
