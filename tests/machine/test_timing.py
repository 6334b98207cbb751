"""Interleaved rounds on a fake clock."""

from collections.abc import Callable, Sequence

import pytest
import torch

from ensemble.machine import timing
from ensemble.machine.devices import synchronize
from ensemble.machine.timing import (
    SETTLE_S,
    Sample,
    interleaved,
    time_call,
)


class FakeClock:
    """A clock that advances only by `spend`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def nothing() -> None:
    pass


def no_faults() -> int:
    return 0


def test_asynchronous_device_work_is_timed() -> None:
    clock, queued = FakeClock(), [0.0]

    def launch() -> None:
        clock.spend(0.25)  # on the host
        queued[0] += 2.0  # on the device, until it is synchronized

    def wait() -> None:
        clock.spend(queued[0])
        queued[0] = 0.0

    assert time_call(launch, synchronize=wait, clock=clock).seconds == 2.25


def test_previously_queued_work_is_not_timed() -> None:
    clock, queued = FakeClock(), [5.0]

    def wait() -> None:
        clock.spend(queued[0])
        queued[0] = 0.0

    sample = time_call(lambda: clock.spend(1.0), synchronize=wait, clock=clock)
    assert sample.seconds == 1.0


def test_page_faults_are_counted_for_the_call_only() -> None:
    faults = iter([100, 140])
    sample = time_call(
        nothing, synchronize=nothing, clock=FakeClock(), page_faults=lambda: next(faults)
    )
    assert sample == Sample(0.0, 40)


def test_uncounted_page_faults_are_none() -> None:
    sample = time_call(nothing, synchronize=nothing, page_faults=lambda: None)
    assert sample.page_faults is None


def rounds_of(
    functions: Sequence[Callable[[], object]],
    clock: FakeClock,
    *,
    min_rounds: int,
    min_seconds: float = 0,
    warmup: int = 0,
) -> list[tuple[Sample, ...]]:
    return list(
        interleaved(
            functions,
            warmup=warmup,
            min_rounds=min_rounds,
            min_seconds=min_seconds,
            synchronize=nothing,
            clock=clock,
            page_faults=no_faults,
        )
    )


def record(
    *, warmup: int, min_rounds: int, min_seconds: float
) -> tuple[str, list[tuple[Sample, ...]]]:
    clock, calls = FakeClock(), []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock.spend(seconds)

    timed = rounds_of(
        [lambda: work("a", 0.125), lambda: work("b", 0.0625)],
        clock,
        warmup=warmup,
        min_rounds=min_rounds,
        min_seconds=min_seconds,
    )
    return "".join(calls), timed


def test_each_function_warms_up_separately_and_rounds_run_in_both_orders() -> None:
    calls, timed = record(warmup=2, min_rounds=50, min_seconds=0)
    assert calls[:4] == "aabb"
    rounds = [calls[start : start + 4] for start in range(4, len(calls), 4)]
    assert set(rounds) == {"aabb", "bbaa"}
    assert 10 < rounds.count("aabb") < 40
    assert timed == [(Sample(0.125, 0), Sample(0.0625, 0))] * 50


def test_interference_of_another_function_falls_on_an_untimed_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "SETTLE_S", SETTLE_S)
    clock, last = FakeClock(), [""]

    def work(name: str) -> None:  # the first two calls after the other function are slow
        last.append(name)
        clock.spend(0.005 if last[-3:] == [name] * 3 else 0.008)

    rounds = rounds_of([lambda: work("a"), lambda: work("b")], clock, min_rounds=10)
    assert [[round(call.seconds, 6) for call in pair] for pair in rounds] == [[0.005, 0.005]] * 10


def test_a_slow_function_is_preceded_by_a_sleep_instead_of_an_untimed_call() -> None:
    clock, calls = FakeClock(), list[str]()
    rests: list[float] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock.spend(seconds)

    functions = [lambda: work("a", 2 * timing.LONG_S), lambda: work("b", 0.125)]
    timed = list(
        interleaved(
            functions,
            warmup=0,
            min_rounds=10,
            min_seconds=0,
            synchronize=nothing,
            clock=clock,
            sleep=rests.append,
            page_faults=no_faults,
        )
    )
    assert len(timed) == 10
    assert rests == [timing.SETTLE_S] * 9  # its time is known after the first call
    assert (calls.count("a"), calls.count("b")) == (11, 20)


def test_one_function_alone_is_settled_by_its_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SETTLE_S", SETTLE_S)
    for seconds, untimed in ((2 * SETTLE_S, 1), (0.75 * SETTLE_S, 2 * 5)):
        clock, calls = FakeClock(), list[float]()

        def work(
            seconds: float = seconds, calls: list[float] = calls, clock: FakeClock = clock
        ) -> None:
            calls.append(seconds)
            clock.spend(seconds)

        assert len(rounds_of([work], clock, min_rounds=5)) == 5
        assert len(calls) == 5 + untimed  # before the first call its time is not known


def test_timing_continues_until_min_rounds_and_min_seconds() -> None:
    assert len(record(warmup=0, min_rounds=4, min_seconds=0.125)[1]) == 4
    assert len(record(warmup=0, min_rounds=1, min_seconds=0.875)[1]) == 3  # of 0.375 s each


def test_a_steady_drift_affects_both_functions_equally() -> None:
    clock, slowness = FakeClock(), [1.0]

    def work() -> None:
        clock.spend(slowness[0])
        slowness[0] *= 1.01

    rounds = rounds_of([work, work], clock, min_rounds=100)
    ratios = [first.seconds / second.seconds for first, second in rounds]
    assert all(ratio == pytest.approx(1, abs=0.0202) for ratio in ratios)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.004)


def test_synchronizing_an_unavailable_device_raises() -> None:
    synchronize(torch.device("cpu"))
    with pytest.raises((RuntimeError, ValueError)):
        synchronize(torch.device("meta"))


def test_a_timed_call_is_prepared_before_the_untimed_ones_that_precede_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "SETTLE_S", SETTLE_S)
    clock, calls = FakeClock(), list[str]()

    def spend(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            clock.spend(seconds)

        return call

    rounds = interleaved(
        [spend("timed", 0.5 * SETTLE_S)],
        untimed=[spend("untimed", 0.75 * SETTLE_S)],
        renew=[spend("renew", 7.0)],
        ready=[spend("ready", 0.0)],
        warmup=1,
        min_rounds=2,
        min_seconds=0,
        synchronize=nothing,
        clock=clock,
        page_faults=no_faults,
    )
    assert [sample.seconds for (sample,) in rounds] == pytest.approx([0.5 * SETTLE_S] * 2)
    one_round = ["renew", *["ready", "untimed"] * 2, "ready", "timed"]
    assert calls == ["ready", "untimed", *one_round * 2]


class FakeDevice:
    """Work runs on it in the order in which it is queued; the host notes what it does."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.free_at, self.log = clock, 0.0, list[str]()

    def queue(self, seconds: float) -> None:
        self.log.append("queue")
        self.free_at = max(self.free_at, self.clock.now) + seconds

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.clock.now = max(self.free_at, self.clock.now) + 0.25  # what the wait itself takes

    def make_event(self) -> "FakeEvent":
        self.log.append("make")
        return FakeEvent(self)


class FakeEvent:
    """Its time stamp is that of the device, once all that was queued before it has run."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.device.log.append("record")
        self.at = max(self.device.free_at, self.device.clock.now)

    def elapsed_time(self, end: "FakeEvent") -> float:
        self.device.log.append("read")
        return 1e3 * (end.at - self.at)


def test_events_time_the_device_without_the_wait_of_the_host() -> None:
    clock = FakeClock()
    device = FakeDevice(clock)
    sample = time_call(
        lambda: device.queue(2.0),
        synchronize=device.synchronize,
        events=(device.make_event(), device.make_event()),
        clock=clock,
        page_faults=no_faults,
    )
    assert sample == Sample(2.25, 0, 2.0)
    assert device.log == [
        *("make", "make", "synchronize"),
        *("record", "queue", "record", "synchronize", "read"),
    ]


def test_each_sample_of_interleaved_rounds_has_the_time_of_its_own_call_on_the_device() -> None:
    clock = FakeClock()
    device = FakeDevice(clock)
    rounds = interleaved(
        [lambda: device.queue(1.0), lambda: device.queue(3.0)],
        warmup=0,
        min_rounds=3,
        min_seconds=0,
        synchronize=device.synchronize,
        make_event=device.make_event,
        clock=clock,
        page_faults=no_faults,
    )
    found = [[sample.device_seconds for sample in samples] for samples in rounds]
    assert found == [[1.0, 3.0]] * 3
    # Made, and recorded once, before the first timed call: CUDA creates an event when recorded.
    assert device.log[:4] == ["make", "make", "record", "record"]
    assert device.log.count("make") == 2


def test_only_cuda_has_events() -> None:
    assert timing.event_maker(torch.device("cpu")) is None
    assert timing.event_maker(torch.device("mps")) is None
    assert timing.event_maker(torch.device("cuda", 1)) is timing.cuda_event
    assert time_call(nothing, synchronize=nothing).device_seconds is None
