"""Which setting of another runtime is the fastest here? Tried at build, and that one is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ensemble.compiler.runtime import serial_copy
from ensemble.formatting import count
from ensemble.machine.timing import Clock, interleaved
from ensemble.strategies.build_result import Built, PerModel, taking_turns

Array = np.ndarray
Run = Callable[[list[Array]], list[Array]]  # each model's batch -> each model's logits
Settings = Mapping[
    str, Callable[[int], Run]
]  # name -> what makes a run of the first so many models


@dataclass(frozen=True)
class Effort:
    """How long to time: at most `rounds` rounds, and once `limit_s` are over no more than `least`.

    A round is an untimed and a timed call of each setting.
    """

    rounds: int
    least: int
    limit_s: float


# Each setting by itself, judged by its fastest call: whatever else the machine does only adds.
SHORT = Effort(rounds=4, least=2, limit_s=1.0)
CLOSE = 1.1  # those that are at most so much slower than the fastest are tried again,
LONG = Effort(rounds=20, least=5, limit_s=2.5)  # in turns, judged by their medians.
# Before each turn in which another had the last one. ONNX Runtime's threads keep a core busy for
# 40 ms after a call, OpenMP's for 5 ms: that must not fall on whoever comes next.
REST_S = 0.05


def size(num_models: int, cores: int) -> int:
    """With how many models to try: all, or where they are many, four or five a core.

    What is left over when the models are dealt to the cores stays: it decides how long the last
    core works alone.
    """
    return min(num_models, 4 * cores + num_models % cores)


def fastest(
    settings: Settings,
    example: Tensor,
    num_models: int,
    *,
    trial: int,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Built:
    """The forward of the setting that is fastest for the first `trial` models.

    Each setting is built, timed and released before the next is built. Those that come out close
    are then held together and timed in interleaved rounds, as the row will be, with a rest between,
    in which the threads of the others sleep. A setting that raises is left out, with its reason.

    Raises:
        Exception: what the first setting raised, where all raise.
    """
    tried = arrays(example, num_models)[:trial]
    timed = partial(_times, batches=tried, clock=clock, sleep=sleep)
    seconds, refused = _alone(settings, trial, timed)
    if not seconds:
        raise next(iter(refused.values()))
    least = min(seconds.values())
    close = {name: settings[name] for name in seconds if seconds[name] <= CLOSE * least}
    runs: dict[str, Run] = {}
    try:
        runs = _together(close, trial, timed, seconds)
    except Exception as error:  # two together may need more memory than there is
        refused["the longer trial"] = error.with_traceback(None)
    best = min(close, key=seconds.__getitem__)
    kept = runs.get(best) if trial == num_models else None
    runs.clear()
    run = kept or settings[best](num_models)

    def forward(x: Tensor) -> PerModel:
        logits = run(arrays(x, num_models))
        return PerModel([torch.from_numpy(array).to(example.dtype) for array in logits])

    return Built(taking_turns(forward), _note(best, trial, seconds, refused))


def _alone(
    settings: Settings, trial: int, timed: Callable[..., list[tuple[float, ...]]]
) -> tuple[dict[str, float], dict[str, Exception]]:
    """Each setting's fastest call, with no other beside it; and what those raised that failed."""
    seconds: dict[str, float] = {}
    refused: dict[str, Exception] = {}
    for name, make in settings.items():
        try:
            seconds[name] = min(timed([make(trial)], effort=SHORT)[0])
        except Exception as error:
            refused[name] = error.with_traceback(None)  # it holds the frames that hold the memory
    return seconds, refused


def _together(
    close: Settings,
    trial: int,
    timed: Callable[..., list[tuple[float, ...]]],
    seconds: dict[str, float],
) -> dict[str, Run]:
    """The runs of settings that are close, held together; `seconds` gets their medians. Of one
    alone there is nothing to try."""
    if len(close) == 1:
        return {}
    runs = {name: make(trial) for name, make in close.items()}
    calls = timed(list(runs.values()), effort=LONG)
    seconds |= dict(zip(runs, map(statistics.median, calls), strict=True))
    return runs


def arrays(x: Tensor, num_models: int) -> list[Array]:
    """Each model's batch in float32, numpy knowing no bfloat16; shared ones share their memory."""
    x = serial_copy.contiguous(x, torch.float32)
    return [batch.numpy() for batch in x] if x.dim() == 5 else [x.numpy()] * num_models


def _times(
    runs: Sequence[Run],
    *,
    effort: Effort,
    batches: list[Array],
    clock: Clock,
    sleep: Callable[[float], None],
) -> list[tuple[float, ...]]:
    """The seconds of each timed call of each."""
    begin, last = clock(), runs[0]
    rounds: list[list[float]] = []

    def call(run: Run) -> None:
        nonlocal last
        if run is not last:  # the first call of a turn, which `interleaved` does not time
            sleep(REST_S)
            last = run
        run(batches)

    for samples in interleaved(
        [partial(call, run) for run in runs],
        warmup=1,
        min_rounds=effort.rounds,
        min_seconds=0.0,
        synchronize=lambda: None,
        clock=clock,
    ):
        rounds.append([sample.seconds for sample in samples])
        if len(rounds) >= effort.least and clock() - begin >= effort.limit_s:
            break
    return list(zip(*rounds, strict=True))


def _note(
    best: str, trial: int, seconds: Mapping[str, float], refused: Mapping[str, Exception]
) -> str:
    """One line."""
    tried = ", ".join(f"{name} {call * 1e3:.1f} ms" for name, call in seconds.items())
    failed = [
        f"; {name} failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
        for name, error in refused.items()
    ]
    return f"setting: {best} (tried with {count(trial, 'model')}: {tried}{''.join(failed)})"
