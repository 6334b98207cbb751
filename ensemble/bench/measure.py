"""Measure one case: build, check, time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy, release_compiled
from ensemble.bench.case import REFERENCE, Task
from ensemble.bench.config import MeasureOptions
from ensemble.bench.failures import optional
from ensemble.bench.host_copies import calls_from_host
from ensemble.bench.measurement import FAILED, UNAVAILABLE, Measurement, Note
from ensemble.bench.setup import Setup
from ensemble.bench.stages import BUILDING, TIMING, OnStage, reported_compilation
from ensemble.bench.timed_calls import TimedCalls, leak, remarks
from ensemble.errors import UnavailableError
from ensemble.machine import gpu_state, memory, other_processes
from ensemble.machine.devices import l2_flush, synchronize
from ensemble.machine.dtypes import numeric_format
from ensemble.machine.precision import Float32Precision, switch_float32_precision
from ensemble.machine.timing import Sample, event_maker, interleaved
from ensemble.statistics import MIN_PAIRS_FOR_INTERVAL, median
from ensemble.strategies.agreement import (
    Check,
    check,
    check_reduced,
    check_same,
    largest_of,
    tolerance_of,
)

# Cores that a forward on an accelerator keeps busy: kernel launches, and the driver.
LAUNCHING = 2
MIN_ALONE = 3  # calls of the reference alone
COPY_CALLS = 7  # timed calls with copies from and to the host

log = logging.getLogger(__name__)


class WrongAnswerError(RuntimeError):
    """A timed call of a strategy gave a wrong answer; the text says how."""


def measure(
    task: Task, setup: Setup, options: MeasureOptions, *, reduce: str, on_stage: OnStage
) -> Measurement:
    """Measure a case in this process. What fails becomes the error of the measurement."""
    case, numbers = task.case, numeric_format(task.case.dtype)
    strategy = task.picked or (REFERENCE if case.is_self_check else case.strategy)
    found = Measurement(case, notes=setup.notes, picked=task.picked)
    try:
        release_compiled()  # within: an asynchronous CUDA error of an earlier case surfaces here
        on_stage(BUILDING, 0.0)
        built = setup.reference
        if not case.is_reference:
            with reported_compilation(strategy, on_stage):
                built = setup.backend.build(strategy, numbers)
        found = _checked(found, built, setup, reduce)
        if found.error:
            return found
        timed = _timed(found, built, setup, options, reduce, on_stage)
        timed = _with_copies(timed, built, setup)
        ranks, notes = setup.backend.rank_times(built, case)
        # Later calls may differ from the first: freed memory is only now overwritten.
        if problem := _problem_of_result(built, setup, reduce):
            return _failed(found, f"after its timed calls, {problem}")
        return replace(timed, ranks=ranks, notes=timed.notes + tuple(map(Note, notes)))
    except WrongAnswerError as error:
        return _failed(found, setup.backend.call_error(strategy, case.dtype) or str(error))
    except UnavailableError as error:
        return replace(found, status=UNAVAILABLE, error=str(error))
    except Exception as error:
        log.debug("%s failed", case, exc_info=True)
        return _failed(found, setup.backend.explain(error, strategy, numbers))
    finally:  # as `devices.configure` has set it
        switch_float32_precision(Float32Precision.IEEE, setup.example.device)


def measurement_of_reference(found: Measurement, setup: Setup) -> Measurement | None:
    """The reference as a measurement of its own: its calls alone; None where there are none."""
    if found.case.is_reference or found.status != "ok" or not found.reference_alone_times_s:
        return None
    logits = setup.reference.logits
    reference = Measurement(replace(found.case, strategy=REFERENCE, dtype="float32"))
    return replace(
        _with_costs(reference, setup.reference),
        times_s=found.reference_alone_times_s,
        device_times_s=_device_times(setup.reference_alone),
        page_faults_per_call=found.reference_page_faults_per_call,
        others_cpu_share=found.others_cpu_share,
        max_rel_error=0.0,
        top1=logits.argmax(-1).tolist() if setup.has_classes else None,
        top1_agreement=1.0 if setup.has_classes else None,
        notes=setup.notes,
    )


def _failed(found: Measurement, error: str) -> Measurement:
    return replace(found, status=FAILED, error=error)


def _with_costs(found: Measurement, built: BuiltStrategy) -> Measurement:
    return replace(
        found,
        build_s=built.build_s,
        first_call_s=built.first_call_s,
        peak_memory_bytes=built.peak_memory_bytes,
        peak_reserved_bytes=built.peak_reserved_bytes,
        held_bytes=built.held_bytes,
        bytes_per_model=built.bytes_per_model,
        tune_s=built.choice.seconds if built.choice else None,
    )


def _checked(found: Measurement, built: BuiltStrategy, setup: Setup, reduce: str) -> Measurement:
    """The measurement with the error of the logits; failed where they disagree."""
    compare = partial(check, tolerance=tolerance_of(built.numbers), has_classes=setup.has_classes)
    agreement, exact = compare(built.logits, setup.reference.logits), None
    if setup.float64_logits is not None:
        exact = compare(built.logits, setup.float64_logits)
    found = replace(
        _with_costs(found, built),
        notes=found.notes + built.notes,
        max_rel_error=agreement.max_rel_error,
        error_float64=exact.max_rel_error if exact else None,
        top1=agreement.top1,
        top1_agreement=agreement.top1_agreement,
        picked=built.choice.name if built.choice else found.picked,
    )
    problem = agreement.problem
    if not problem and reduce != "none":
        problem = _problem_of_result(built, setup, reduce)
    return _failed(found, problem) if problem else found


def _problem_of_result(built: BuiltStrategy, setup: Setup, reduce: str) -> str | None:
    """What is wrong with the result of a call: logits, or their mean over the models."""
    return check_reduced(
        built.call(),
        setup.reference.logits,
        reduce=reduce,
        tolerance=tolerance_of(built.numbers),
        has_classes=setup.has_classes,
    ).problem


def time_alone(setup: Setup, options: MeasureOptions) -> tuple[Sample, ...]:
    """Time the reference before anything else is built: for half of the pairs and seconds that the
    options ask for, but in no more calls than an interval needs.

    What is built later may slow it. The loop of one ResNet-18 took 1.28 times as long once
    `concurrent`, with a second team of OpenMP, was built, and 1.2 to 1.5 times in turns with ONNX
    Runtime, whose threads spin for work (2 cores).
    """
    reference = setup.reference
    calls, device = TimedCalls(reference, setup.example), setup.example.device
    rounds = interleaved(
        [calls],
        ready=_ready([reference], device, options),
        untimed=[calls.repeat],
        renew=[calls.renew],
        warmup=options.warmup,
        min_rounds=min(MIN_PAIRS_FOR_INTERVAL, max(MIN_ALONE, options.min_pairs // 2)),
        min_seconds=options.min_seconds / 2,
        make_event=event_maker(device),
        synchronize=lambda: synchronize(device),
    )
    return tuple(sample for (sample,) in rounds)


def _ready(
    timed: Sequence[BuiltStrategy], device: torch.device, options: MeasureOptions
) -> list[Callable[[], None]]:
    """What runs untimed before each call of each strategy."""
    if not options.flush_l2:
        return [one.ready for one in timed]
    flush = l2_flush(device)

    def ready(one: BuiltStrategy) -> None:
        one.ready()
        flush()

    return [partial(ready, one) for one in timed]


@dataclass
class _Rounds:
    """The timed rounds of a case: the samples of each, in the order reference, strategy; and after
    each round the memory in use, the calls of the strategy so far, and the error of its answer."""

    samples: list[tuple[Sample, ...]] = field(default_factory=list)
    used_bytes: list[int | None] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def _timed(
    found: Measurement,
    built: BuiltStrategy,
    setup: Setup,
    options: MeasureOptions,
    reduce: str,
    on_stage: OnStage,
) -> Measurement:
    """Time the strategy in pairs with the reference; the reference alone.

    Raises:
        WrongAnswerError: an answer is wrong.
    """
    own, is_cpu = setup.backend.own_processes, setup.example.device.type == "cpu"
    is_reference, before = found.case.is_reference, other_processes.read(own)
    timed = [setup.reference] if is_reference else [setup.reference, built]
    reader = gpu_state.open_reader(setup.example.device)
    rounds = _time_rounds(timed, setup, options, reduce, on_stage)
    gpu = reader.read(own=own) if reader else None  # at once, before its clocks fall
    after = other_processes.read(own)
    left_behind = remarks(leak(rounds.used_bytes, rounds.calls), other_processes.busy_cores(own))
    ours = [samples[-1] for samples in rounds.samples]
    paired = [] if is_reference else [samples[0] for samples in rounds.samples]
    alone = () if is_reference else setup.reference_alone
    return replace(
        found,
        times_s=tuple(sample.seconds for sample in ours),
        reference_times_s=tuple(sample.seconds for sample in paired),
        device_times_s=_device_times(ours),
        reference_device_times_s=_device_times(paired),
        reference_alone_times_s=tuple(sample.seconds for sample in alone),
        page_faults_per_call=_page_faults(ours),
        reference_page_faults_per_call=_page_faults(alone),
        others_cpu_share=other_processes.share_of_others(
            before, after, needed=None if is_cpu else LAUNCHING
        ),
        max_rel_error=max([found.max_rel_error or 0.0, *rounds.errors]),
        notes=found.notes + tuple(map(Note, left_behind)),
        gpu=gpu,
    )


def _time_rounds(
    timed: Sequence[BuiltStrategy],
    setup: Setup,
    options: MeasureOptions,
    reduce: str,
    on_stage: OnStage,
) -> _Rounds:
    """Time the reference alone, or with a strategy whose answers are compared with its.

    Raises:
        WrongAnswerError: an answer is wrong.
    """
    device, largest = setup.example.device, largest_of(setup.reference.logits)
    calls = [TimedCalls(one, setup.example) for one in timed]
    rounds, begin = _Rounds(), time.perf_counter()
    for samples in interleaved(
        calls,
        ready=_ready(timed, device, options),
        untimed=[one.repeat for one in calls],
        renew=[one.renew for one in calls],
        warmup=options.warmup,
        min_rounds=options.min_pairs,
        min_seconds=options.min_seconds,
        make_event=event_maker(device),
        synchronize=lambda: synchronize(device),
    ):
        rounds.samples.append(samples)
        rounds.used_bytes.append(memory.used_bytes(device))
        rounds.calls.append(calls[-1].calls)
        if len(calls) > 1:
            same = partial(
                check_same,
                reduce=reduce,
                tolerance=tolerance_of(timed[-1].numbers),
                largest=largest,
                has_classes=setup.has_classes,
            )
            error = _error_of_answer(calls[0], calls[1], same)
            rounds.errors += [error] if reduce == "none" else []  # else of probabilities
        waited = (time.perf_counter() - begin) / options.min_seconds if options.min_seconds else 1.0
        on_stage(TIMING, min(1.0, waited, len(rounds.samples) / options.min_pairs))
    return rounds


def _error_of_answer(
    reference: TimedCalls, strategy: TimedCalls, same: Callable[[Tensor, Tensor], Check]
) -> float:
    """The error of the strategy's last timed answer, see `agreement.check_same`.

    Raises:
        WrongAnswerError: it is wrong.
    """
    assert reference.result is not None
    assert strategy.result is not None
    found = same(strategy.result, reference.result)
    if found.problem:
        cause = "the answer to an earlier input; " if strategy.repeats else ""
        raise WrongAnswerError(f"in a timed call with a new input, {cause}{found.problem}")
    return found.max_rel_error or 0.0


def _with_copies(found: Measurement, built: BuiltStrategy, setup: Setup) -> Measurement:
    """The measurement with the time of calls from pinned host memory to the host, on CUDA."""
    device = setup.example.device
    if device.type != "cuda":
        return found
    seconds, problem = optional("time with copies", lambda: _seconds_with_copies(built, setup))
    notes = found.notes + tuple(map(Note, problem))
    return replace(found, with_copies_s=seconds, notes=notes)


def _seconds_with_copies(built: BuiltStrategy, setup: Setup) -> float | None:
    calls = calls_from_host(built, setup.example)
    rounds = interleaved(
        [calls],
        ready=[built.ready],
        untimed=[calls.repeat],
        renew=[calls.renew],
        warmup=1,
        min_rounds=COPY_CALLS,
        min_seconds=0.0,
        synchronize=lambda: synchronize(setup.example.device),
    )
    return median([sample.seconds for (sample,) in rounds])


def _device_times(samples: Sequence[Sample]) -> tuple[float, ...]:
    return tuple(one.device_seconds for one in samples if one.device_seconds is not None)


def _page_faults(samples: Sequence[Sample]) -> float | None:
    return median([sample.page_faults for sample in samples if sample.page_faults is not None])
