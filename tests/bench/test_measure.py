"""How one case is measured: which calls are timed, what they are compared with, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ensemble.bench import host_copies
from ensemble.bench import measure as module
from ensemble.bench.build import BuiltStrategy
from ensemble.bench.case import Task
from ensemble.bench.measure import measure, measurement_of_reference, time_alone
from ensemble.bench.measurement import Measurement
from ensemble.bench.setup import Backend, Setup
from ensemble.bench.timed_calls import TimedCalls
from ensemble.machine import gpu_state, memory, other_processes
from ensemble.machine.dtypes import FLOAT32, NumericFormat, numeric_format
from ensemble.machine.gpu_state import GpuReader, GpuState
from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
    set_float32_precision,
)
from ensemble.machine.timing import Sample
from tests.made import CASE, CONFIG, with_options

IMAGE = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(2, 48, 5, generator=torch.Generator().manual_seed(1))
OPTIONS = with_options(CONFIG, warmup=1, min_pairs=8, min_seconds=0.0).measure
VMAP = Task(replace(CASE, num_models=2, image_size=4))
MB = 1_000_000

Forward = Callable[[Tensor], Tensor]


def logits(x: Tensor) -> Tensor:
    """(1, 3, 4, 4) -> (2, 1, 5): two linear models."""
    return torch.einsum("bi,nik->nbk", x.flatten(1), WEIGHTS)


def built(forward: Forward, numbers: NumericFormat = FLOAT32) -> BuiltStrategy:
    return BuiltStrategy(
        forward=forward,
        timed_forward=forward,
        example=IMAGE,
        logits=logits(IMAGE),
        build_s=2.0,
        first_call_s=1.0,
        peak_memory_bytes=None,
        notes=(),
        ready=partial(set_float32_precision, numbers.float32_precision),
        numbers=numbers,
    )


def setup_of(strategy: Forward, reference: Forward = logits) -> Setup:
    backend = Backend(
        build=lambda name, numbers: built(strategy, numbers),
        explain=lambda error, name, numbers: str(error),
        float64_logits=lambda: logits(IMAGE),
    )
    return Setup(backend, (torch.nn.Linear(1, 3),), IMAGE, IMAGE, built(reference), None, ())


def measured(setup: Setup) -> Measurement:
    return measure(VMAP, setup, OPTIONS, reduce="none", on_stage=lambda stage, done: None)


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_processes, "busy_cores", lambda own: 0.0)


class Noted:
    """A forward that notes its inputs."""

    def __init__(self) -> None:
        self.inputs: list[bytes] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x.numpy().tobytes())
        return logits(x)


def test_the_reference_alone_gets_a_new_input_a_call_and_the_calls_of_an_interval() -> None:
    reference = Noted()
    samples = time_alone(setup_of(logits, reference), OPTIONS)
    assert len(samples) == 4  # half of the 8 pairs
    for pairs, calls in ((30, 6), (4, 3)):  # what an interval needs at most; three at least
        asked = replace(OPTIONS, min_pairs=pairs)
        assert len(time_alone(setup_of(logits, Noted()), asked)) == calls
    assert len(set(reference.inputs)) == 1 + 4  # the example, by which it warms up, and a new one


def test_both_of_a_pair_get_the_same_new_input() -> None:
    strategy, reference = Noted(), Noted()
    row = measured(setup_of(strategy, reference))
    assert (row.status, row.max_rel_error) == ("ok", 0.0)
    assert len(row.times_s) == len(row.reference_times_s) == 8
    assert len(set(strategy.inputs)) == 1 + 8
    assert set(strategy.inputs) == set(reference.inputs)


def test_an_answer_to_an_earlier_input_fails_the_row() -> None:
    answer = logits(IMAGE)
    row = measured(setup_of(lambda x: answer))
    assert row.status == "failed"
    assert (row.error or "").startswith(
        "in a timed call with a new input, the answer to an earlier input; outputs disagree: "
    )


def test_an_answer_that_is_wrong_but_new_is_not_called_an_earlier_one() -> None:
    row = measured(setup_of(lambda x: logits(x) * (1.0 if torch.equal(x, IMAGE) else 1.1)))
    assert row.status == "failed"
    assert (row.error or "").startswith("in a timed call with a new input, outputs disagree: ")


def test_an_answer_that_is_wrong_after_the_timed_calls_fails_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = []

    def after_the_timed_calls(own: Sequence[int]) -> float:
        wrong.append(True)
        return 0.0

    monkeypatch.setattr(other_processes, "busy_cores", after_the_timed_calls)
    row = measured(setup_of(lambda x: logits(x) * (1.1 if wrong else 1.0)))
    assert row.status == "failed"
    assert (row.error or "").startswith("after its timed calls, outputs disagree: ")


def test_the_error_of_a_row_is_the_largest_of_its_timed_answers() -> None:
    """Half of the tolerance of 1e-4, in one of 8 timed calls."""
    strategy = Noted()

    def once_inexact(x: Tensor) -> Tensor:
        right, seen = strategy(x), set(strategy.inputs)
        return right * (1 + 5e-5) if len(seen) == 4 else right

    row = measured(setup_of(once_inexact))
    assert row.status == "ok"
    assert row.max_rel_error == pytest.approx(5e-5, rel=0.01)


def samples_of(*rounds: tuple[Sample, ...]) -> Callable[..., Iterator[tuple[Sample, ...]]]:
    """`interleaved` with made-up samples."""

    def interleaved(
        functions: Sequence[Callable[[], None]],
        *,
        renew: Sequence[Callable[[], None]],
        **_: object,
    ) -> Iterator[tuple[Sample, ...]]:
        for samples in rounds:
            for prepare, function in zip(renew, functions, strict=True):
                prepare()
                function()
            yield samples

    return interleaved


def test_times_and_page_faults_are_those_of_the_strategy_the_pairs_and_the_reference_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [(Sample(2.0 + k, 10 + k), Sample(1.0 + k, 30 + k)) for k in (0, 1, 2)]
    monkeypatch.setattr(module, "interleaved", samples_of(*pairs))
    alone = (Sample(5.0, 70), Sample(6.0, 72))
    row = measured(replace(setup_of(logits), reference_alone=alone))
    assert row.times_s == (1.0, 2.0, 3.0)
    assert row.reference_times_s == (2.0, 3.0, 4.0)
    assert row.reference_alone_times_s == (5.0, 6.0)
    assert row.page_faults_per_call == 31.0
    assert row.reference_page_faults_per_call == 71.0
    reference = measurement_of_reference(row, setup_of(logits))
    assert reference is not None
    assert reference.case.is_reference
    assert reference.times_s == (5.0, 6.0)
    assert reference.reference_times_s == ()
    assert reference.page_faults_per_call == 71.0
    assert (reference.build_s, reference.first_call_s) == (2.0, 1.0)


def test_a_row_without_times_of_the_reference_alone_is_none_of_the_reference() -> None:
    assert measurement_of_reference(Measurement(CASE, times_s=(1.0,)), setup_of(logits)) is None


def test_a_leak_is_that_of_a_call_of_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB a round, which has one call that is timed and one before it: 10 MB a call."""
    used = iter(range(100 * MB, 1000 * MB, 20 * MB))
    monkeypatch.setattr(memory, "used_bytes", lambda device: next(used))
    row = measured(setup_of(logits))
    assert [str(note) for note in row.notes] == ["memory grows by 10.0 MB per call"]


def test_an_error_that_surfaces_when_memory_is_released_is_a_failed_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA reports the error of an earlier kernel in a later call."""

    def surface() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, "release_compiled", surface)
    row = measured(setup_of(logits))
    assert row.status == "failed"
    assert row.error == "CUDA error: an illegal memory access was encountered"


class NotedPrecision:
    """A forward that notes the precision of float32 products in its calls."""

    def __init__(self) -> None:
        self.found: list[Float32Precision] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.found.append(current_float32_precision())
        return logits(x)


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_in_pairs_the_reference_multiplies_in_ieee_and_the_strategy_in_its_own_precision(
    dtype: str,
) -> None:
    strategy, reference = NotedPrecision(), NotedPrecision()
    task = replace(VMAP, case=replace(VMAP.case, dtype=dtype))
    with float32_precision(Float32Precision.IEEE):
        setup = setup_of(strategy, reference)
        row = measure(task, setup, OPTIONS, reduce="none", on_stage=lambda stage, done: None)
    assert row.status == "ok"
    assert min(len(strategy.found), len(reference.found)) >= 16  # timed and untimed
    assert set(reference.found) == {Float32Precision.IEEE}
    assert set(strategy.found) == {numeric_format(dtype).float32_precision}


@pytest.mark.parametrize(("dtype", "status"), [("float32", "failed"), ("tf32", "ok")])
def test_a_row_in_tf32_has_a_tolerance_of_its_own(dtype: str, status: str) -> None:
    task = replace(VMAP, case=replace(VMAP.case, dtype=dtype))
    with float32_precision(Float32Precision.IEEE):
        setup = setup_of(lambda x: logits(x) * (1 + 5e-4))
        row = measure(task, setup, OPTIONS, reduce="none", on_stage=lambda stage, done: None)
    assert row.status == status


def test_times_of_the_device_are_those_of_the_strategy_the_pairs_and_the_reference_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [(Sample(2.0, 0, 1.0 + k), Sample(1.0, 0, 0.5 + k)) for k in (0, 1, 2)]
    monkeypatch.setattr(module, "interleaved", samples_of(*pairs))
    setup = replace(setup_of(logits), reference_alone=(Sample(5.0, 0, 4.5), Sample(6.0, 0, 5.5)))
    row = measured(setup)
    assert row.device_times_s == (0.5, 1.5, 2.5)
    assert row.reference_device_times_s == (1.0, 2.0, 3.0)
    reference = measurement_of_reference(row, setup)
    assert reference is not None
    assert (reference.times_s, reference.device_times_s) == ((5.0, 6.0), (4.5, 5.5))


def test_on_a_cpu_no_call_is_timed_by_events_nor_from_another_memory() -> None:
    row = measured(setup_of(logits))
    assert (row.device_times_s, row.reference_device_times_s) == ((), ())
    assert (row.with_copies_s, row.peak_reserved_bytes, row.gpu) == (None, None, None)


def test_events_are_asked_for_by_the_device_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    class CountingEvent:
        def record(self) -> None:
            pass

        def elapsed_time(self, end: object) -> float:
            return 3.0

    asked: list[torch.device] = []

    def maker(device: torch.device) -> Callable[[], CountingEvent]:
        asked.append(device)
        return CountingEvent

    monkeypatch.setattr(module, "event_maker", maker)
    setup = setup_of(logits)
    alone = time_alone(setup, OPTIONS)
    row = measured(replace(setup, reference_alone=alone))
    assert asked == [IMAGE.device] * 2
    assert row.device_times_s == row.reference_device_times_s == (0.003,) * 8
    assert [sample.device_seconds for sample in alone] == [0.003] * 4


def test_the_l2_cache_is_flushed_before_each_call_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    def forward(x: Tensor) -> Tensor:
        log.append("call")
        return logits(x)

    monkeypatch.setattr(module, "l2_flush", lambda device: lambda: log.append("flush"))
    setup = setup_of(forward, forward)
    log.clear()
    time_alone(setup, replace(OPTIONS, flush_l2=True))
    assert log == ["flush", "call"] * (len(log) // 2)
    assert len(log) > 8
    log.clear()
    time_alone(setup, OPTIONS)
    assert set(log) == {"call"}


class OnCuda:
    """Fake tensors on CUDA: a strategy whose calls note where their inputs lie."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[torch.device] = []
        self._setup = setup_of(logits)
        monkeypatch.setattr(host_copies, "pinned", lambda x: x.cpu())  # fake tensors have none

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.device)
        return x.flatten(1)

    def built(self, forward: Forward) -> tuple[BuiltStrategy, Setup]:
        image = torch.empty(1, 3, 4, 4, device="cuda")
        reference = self._setup.reference
        strategy = replace(reference, forward=forward, timed_forward=forward, example=image)
        return strategy, replace(self._setup, example=image)


def test_the_time_with_copies_is_the_median_of_calls_from_host_memory_to_host_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[torch.device] = []

    def interleaved(
        functions: Sequence[TimedCalls], *, renew: Sequence[Callable[[], None]], **_: object
    ) -> Iterator[tuple[Sample, ...]]:
        for seconds in (0.3, 0.1, 0.2):
            renew[0]()
            functions[0]()
            assert functions[0].result is not None
            found.append(functions[0].result.device)
            yield (Sample(seconds, 0),)

    cuda = OnCuda(monkeypatch)
    with FakeTensorMode():
        strategy, setup = cuda.built(cuda.forward)
        monkeypatch.setattr(module, "interleaved", interleaved)
        row = module._with_copies(Measurement(CASE), strategy, setup)
    assert row.with_copies_s == 0.2
    assert {device.type for device in cuda.seen} == {"cuda"}
    assert {device.type for device in found} == {"cpu"}


def test_a_time_with_copies_that_cannot_be_had_costs_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("cannot pin memory")

    cuda = OnCuda(monkeypatch)
    with FakeTensorMode():
        row = module._with_copies(Measurement(CASE), *cuda.built(fails))
    assert (row.status, row.with_copies_s) == ("ok", None)
    assert [str(note) for note in row.notes] == [
        "no time with copies: RuntimeError: cannot pin memory"
    ]


def test_the_state_of_the_gpu_is_read_right_after_the_last_timed_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Reader(GpuReader):
        def __init__(self) -> None:
            log.append("open")

        def read(self, *, own: Collection[int] = ()) -> GpuState:
            log.append("read")
            return GpuState("GPU-x", throttle_reasons=("SwPowerCap",))

    def forward(x: Tensor) -> Tensor:
        log.append("call")
        return logits(x)

    read = other_processes.read

    def read_processes(own: Sequence[int]) -> object:
        log.append("processes")
        return read(own)

    monkeypatch.setattr(gpu_state, "open_reader", lambda device: Reader())
    monkeypatch.setattr(other_processes, "read", read_processes)
    row = measured(setup_of(forward))
    assert row.gpu == GpuState("GPU-x", throttle_reasons=("SwPowerCap",))
    assert log.index("open") < log.index("call", log.index("open"))
    assert log[log.index("read") - 1 : log.index("read") + 2] == ["call", "read", "processes"]
