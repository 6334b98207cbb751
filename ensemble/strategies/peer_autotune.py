"""The autotuner of another runtime's settings: each is timed in isolation, close ones interleaved.

The thread pools of a runtime keep spinning after a call and slow the next one, so settings are
first built, timed and released one at a time. Only those close to the fastest are then held
together and timed in interleaved rounds, on the CPU with a rest before each change of setting.

`autotune` tunes between strategies, which share torch's threads: it compares pairs from the start.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ensemble.compiler.runtime import serial_copy
from ensemble.formatting import count
from ensemble.machine.devices import synchronize
from ensemble.machine.memory import release
from ensemble.machine.timing import Clock, interleaved
from ensemble.strategies.autotune import describe
from ensemble.strategies.build_result import BuildResult, PerModel, serialized

RunModels = Callable[[list[Tensor]], list[Tensor]]  # each model's batch -> each model's logits
Settings = Mapping[str, Callable[[int], RunModels]]  # name -> builder for the first K models


@dataclass(frozen=True)
class Effort:
    """How long to time: up to `max_rounds`, but only `min_rounds` once `limit_s` have passed.

    A round is a timed call of each setting, and of several an untimed one before it.
    """

    max_rounds: int
    min_rounds: int
    limit_s: float


# Each setting in isolation, scored by its fastest call: interference only ever adds time.
SHORT = Effort(max_rounds=4, min_rounds=2, limit_s=1.0)
CLOSE = 1.1  # settings within this factor of the fastest are timed again,
LONG = Effort(max_rounds=20, min_rounds=5, limit_s=2.5)  # interleaved, scored by their medians
# Before a call of another setting than the last. After a call the threads of ONNX Runtime spin for
# 40 ms, those of OpenMP for 5 ms; they must not slow the next setting.
REST_S = 0.05


def tuning_size(num_models: int, cores: int) -> int:
    """The number of models to tune with: all, or four to five per core if there are more.

    The remainder modulo the cores is kept: it determines the load imbalance at the end.
    """
    return min(num_models, 4 * cores + num_models % cores)


def select_fastest(
    settings: Settings,
    example: Tensor,
    num_models: int,
    *,
    tuning_models: int,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> BuildResult:
    """A forward of all models in the setting that is fastest for the first `tuning_models`.

    A setting that raises is rejected, and its error is noted.

    Raises:
        Exception: the error of the first setting, if all of them fail.
    """
    given = batches(example, num_models)[:tuning_models]
    timed = partial(_times, batches=given, clock=clock, sleep=sleep)
    times_s, errors = _time_in_isolation(settings, tuning_models, timed, example.device)
    if not times_s:
        raise next(iter(errors.values()))
    fastest_s = min(times_s.values())
    close = {name: settings[name] for name in times_s if times_s[name] <= CLOSE * fastest_s}
    runs: dict[str, RunModels] = {}
    try:
        runs = _time_interleaved(close, tuning_models, timed, times_s)
    except Exception as error:  # several settings at once may exceed the memory
        errors["interleaved timing"] = error.with_traceback(None)
    best = min(close, key=times_s.__getitem__)
    kept = runs.get(best) if tuning_models == num_models else None
    runs.clear()
    run = kept or settings[best](num_models)

    def forward(x: Tensor) -> PerModel:
        logits = run(batches(x, num_models))
        return PerModel([tensor.to(example.dtype) for tensor in logits])

    tried = f"tried with {count(tuning_models, 'model')}: {describe(times_s, errors)}"
    return BuildResult(serialized(forward), f"setting: {best}", tried)


def _time_in_isolation(
    settings: Settings,
    tuning_models: int,
    timed: Callable[..., list[tuple[float, ...]]],
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Exception]]:
    """The fastest call of each setting, in seconds, and the errors of those that failed."""
    times_s: dict[str, float] = {}
    errors: dict[str, Exception] = {}
    for name, make in settings.items():
        try:
            times_s[name] = min(timed([make(tuning_models)], effort=SHORT)[0])
        except Exception as error:
            errors[name] = error.with_traceback(None)  # its frames would keep the memory alive
        if device.type != "cpu":
            release()  # runtimes have allocators of their own, which torch's cache leaves less
    return times_s, errors


def _time_interleaved(
    close: Settings,
    tuning_models: int,
    timed: Callable[..., list[tuple[float, ...]]],
    times_s: dict[str, float],
) -> dict[str, RunModels]:
    """Build the close settings, held together, and store their median seconds in `times_s`. Does
    nothing for a single one."""
    if len(close) == 1:
        return {}
    runs = {name: make(tuning_models) for name, make in close.items()}
    calls = timed(list(runs.values()), effort=LONG)
    times_s |= dict(zip(runs, map(statistics.median, calls), strict=True))
    return runs


def batches(x: Tensor, num_models: int) -> list[Tensor]:
    """Each model's contiguous batch; shared batches are aliases. On the CPU in float32, as most
    runtimes take numpy arrays there, and numpy has no bfloat16."""
    x = serial_copy.contiguous(x, torch.float32 if x.device.type == "cpu" else x.dtype)
    return list(x) if x.dim() == 5 else [x] * num_models


def _times(
    runs: Sequence[RunModels],
    *,
    effort: Effort,
    batches: list[Tensor],
    clock: Clock,
    sleep: Callable[[float], None],
) -> list[tuple[float, ...]]:
    """The seconds of each timed call, per run."""
    begin, last, device = clock(), runs[0], batches[0].device
    rounds: list[list[float]] = []

    def call(run: RunModels) -> None:
        nonlocal last
        if run is not last:  # before an untimed call of `interleaved`
            if device.type == "cpu":
                sleep(REST_S)
            last = run
        run(batches)

    for samples in interleaved(
        [partial(call, run) for run in runs],
        warmup=1,
        min_rounds=effort.max_rounds,
        min_seconds=0.0,
        synchronize=partial(synchronize, device),
        clock=clock,
    ):
        rounds.append([sample.seconds for sample in samples])
        if len(rounds) >= effort.min_rounds and clock() - begin >= effort.limit_s:
            break
    return list(zip(*rounds, strict=True))
