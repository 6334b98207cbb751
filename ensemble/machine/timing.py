"""Time functions against each other in interleaved rounds. Independent of models.

Each round calls all functions in a random order from a fixed seed, so that drift of the clock
frequency and order effects affect all functions equally. Random, not alternating: a period of two
synchronizes with periodic allocator and cache states. The median ratio of two identical loops over
20 rounds had a between-process standard deviation of 2.2 % when alternated, 0.9 % when randomized.

Before each timed call the same function runs untimed for at least `SETTLE_S`, to reach its own
steady state as in serving: OpenMP worker threads spin for about 5 ms after a parallel loop, which
slowed a strategy with its own thread pool from 46 to 54 ms (N=4) when the loop had run just before.
A function that takes `LONG_S` or more is preceded by a sleep of `SETTLE_S` instead: the worker
threads go to sleep, and the cache misses are negligible relative to its run time (16 ResNet-18:
within 1 % of the warm time for three strategies, 4 % for the loop). One function alone that takes
`SETTLE_S` or more is settled by its own calls.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ensemble.machine import memory

Clock = Callable[[], float]

SETTLE_S = 0.01  # twice the time that libgomp threads spin before they sleep
LONG_S = 0.2


@dataclass(frozen=True)
class Sample:
    """One timed call: its seconds, its page faults (None where the platform does not count them),
    and the seconds between two events on the device's stream (None without events)."""

    seconds: float
    page_faults: int | None
    device_seconds: float | None = None


class Event(Protocol):
    """A time stamp on a stream, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Queue the time stamp on the current stream."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`, both of which are reached."""


def cuda_event() -> Event:
    """An event of CUDA with a time stamp."""
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


def event_maker(device: torch.device) -> Callable[[], Event] | None:
    """What makes the events that time the device itself; None where nothing does."""
    return cuda_event if device.type == "cuda" else None


def time_call(
    function: Callable[[], object],
    *,
    synchronize: Callable[[], None],
    events: tuple[Event, Event] | None = None,
    clock: Clock = time.perf_counter,
    page_faults: Callable[[], int | None] = memory.page_faults,
) -> Sample:
    """Time one call, from an idle device to an idle device.

    Excludes waiting for previously queued work, counting page faults, reading the events, and
    freeing the result. With `events`, the first is recorded just before the clock starts, and the
    second after the call, before the device is waited for: they leave out the launch of the wait,
    and what the host does until it returns.
    """
    synchronize()
    faults_before = page_faults()
    if events:
        events[0].record()
    start = clock()
    result = function()
    if events:
        events[1].record()
    synchronize()
    seconds = clock() - start
    faults = page_faults()
    del result
    on_device = 1e-3 * events[0].elapsed_time(events[1]) if events else None
    if faults is None or faults_before is None:
        return Sample(seconds, None, on_device)
    return Sample(seconds, faults - faults_before, on_device)


def interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    warmup: int,
    min_rounds: int,
    min_seconds: float,
    synchronize: Callable[[], None],
    ready: Sequence[Callable[[], None]] | None = None,
    untimed: Sequence[Callable[[], object]] | None = None,
    renew: Sequence[Callable[[], None]] | None = None,
    make_event: Callable[[], Event] | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    page_faults: Callable[[], int | None] = memory.page_faults,
) -> Iterator[tuple[Sample, ...]]:
    """Yield rounds of samples; each round times every function once, in random order.

    The samples of a round are in the order of `functions`. Every function first runs `warmup`
    untimed calls. Stops after at least `min_rounds` rounds and `min_seconds` seconds. `make_event`,
    if given, makes the two events that also time each call on the device.

    These, if given, have a callback per function:
        ready: runs untimed before each of its calls.
        untimed: is called in its place where it is not timed.
        renew: prepares its next timed call, before the untimed ones that precede it.
    """
    before = ready or [lambda: None for _ in functions]
    settling = [
        partial(_call_both, *both) for both in zip(before, untimed or functions, strict=True)
    ]
    for call in settling:
        for _ in range(warmup):
            call()
    timed = partial(
        time_call,
        synchronize=synchronize,
        events=_recorded_pair(make_event) if make_event else None,
        clock=clock,
        page_faults=page_faults,
    )
    begin, rounds, last = clock(), 0, dict[int, float]()
    order, generator = list(range(len(functions))), random.Random(0)
    while rounds < min_rounds or clock() - begin < min_seconds:
        generator.shuffle(order)
        samples = {}
        for index in order:
            if renew is not None:
                renew[index]()
            if len(functions) == 1 and last.get(index, 0.0) >= SETTLE_S:
                pass  # its own call has just settled it
            elif last.get(index, 0.0) >= LONG_S:
                sleep(SETTLE_S)
            else:
                _settle(settling[index], synchronize, clock)
            before[index]()
            samples[index] = timed(functions[index])
            last[index] = samples[index].seconds
        yield tuple(samples[index] for index in range(len(functions)))
        rounds += 1


def _recorded_pair(make_event: Callable[[], Event]) -> tuple[Event, Event]:
    """Two events, recorded once: CUDA creates an event when it is first recorded."""
    pair = make_event(), make_event()
    for event in pair:
        event.record()
    return pair


def _call_both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def _settle(function: Callable[[], object], synchronize: Callable[[], None], clock: Clock) -> None:
    """Call a function untimed for at least `SETTLE_S` seconds."""
    deadline = clock() + SETTLE_S
    while True:
        function()
        synchronize()
        if clock() >= deadline:
            return
