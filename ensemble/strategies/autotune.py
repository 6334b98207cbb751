"""The autotuner of strategies: candidates with the same logits, each timed against the incumbent.

Candidates are built, checked and timed one at a time, in interleaved rounds with the incumbent, the
fastest so far. The loser is released before the next candidate is built, so at most two are alive,
and every decision rests on paired ratios that are robust to drift of the machine's speed.

`peer_autotune` tunes the settings of another runtime, whose thread pools disturb each other: it
times each setting in isolation first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ensemble.errors import drop_frames, first_line
from ensemble.formatting import milliseconds
from ensemble.machine import captured_warnings
from ensemble.machine.devices import synchronize
from ensemble.machine.memory import available_bytes, release
from ensemble.machine.timing import Clock, interleaved
from ensemble.strategies.build_result import BuildResult, ForwardFn

# A comparison lasts MIN_SECONDS and MIN_ROUNDS at least, and up to MAX_SECONDS while the median
# ratio is within CLOSE. It stops after two rounds whose ratios both exceed CLEAR.
MIN_SECONDS, MAX_SECONDS, MIN_ROUNDS = 0.33, 1.0, 3
CLOSE, CLEAR = 1.08, 1.3
MIN_SPEEDUP = 1.04  # of a candidate to replace the incumbent: ties keep the earlier one


class SkippedError(RuntimeError):
    """A candidate was not built: the autotuning budget or the memory is exhausted."""


@dataclass
class AutotuneResult:
    """The incumbent, and per candidate its seconds per call, its error, and its build seconds."""

    name: str = ""
    built: BuildResult | None = None
    times_s: dict[str, float] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    build_s: dict[str, float] = field(default_factory=dict)

    @property
    def tried(self) -> str:
        """All candidates in one line: milliseconds per call, or the error."""
        return describe(self.times_s, self.errors)


def describe(times_s: Mapping[str, float], errors: Mapping[str, Exception]) -> str:
    """`loop 54 ms, vmap 61 ms; concurrent: out of memory`."""
    times = [f"{name} {milliseconds(seconds)}" for name, seconds in times_s.items()]
    failed = [f"{name}: {first_line(error)}" for name, error in errors.items()]
    return "; ".join([", ".join(times), *failed] if times else failed)


def select_fastest(
    candidates: Mapping[str, Callable[[], BuildResult]],
    example: Tensor,
    *,
    check: Callable[[Tensor], None],
    seconds: float,
    bytes_each: int = 0,
    clock: Clock = time.perf_counter,
) -> AutotuneResult:
    """Find the fastest candidate; ties go to the earlier one.

    A candidate whose builder or whose `check` raises is rejected, and its error is recorded.

    Args:
        candidates: name -> builder.
        example: the input of all timed calls.
        check: raises if the logits of the example are wrong.
        seconds: autotuning budget: no further candidate is built after it, except the first.
        bytes_each: memory that a candidate may require; it is skipped if less is available, as the
            out-of-memory killer would end the whole process.

    Raises:
        Exception: the error of the first candidate, if all of them fail.
    """
    result, begin = AutotuneResult(), clock()
    for name, make in candidates.items():
        try:
            if result.built is not None:
                _check_budget(example, clock() - begin, seconds, bytes_each)
            _try_candidate(result, name, make, example, check, clock)
        except Exception as error:
            drop_frames(error)  # they would keep tensors alive
            result.errors[name] = error
        if result.build_s.keys() - {result.name} or result.errors:
            release()  # the memory of the loser, before the next candidate is built
    if result.built is None:
        raise next(iter(result.errors.values()))
    return result


def _check_budget(example: Tensor, elapsed: float, seconds: float, bytes_each: int) -> None:
    """Raise SkippedError if the time budget or the memory is exhausted."""
    if elapsed > seconds:
        raise SkippedError(f"skipped: autotuning budget of {seconds:g} s exceeded (--tune_seconds)")
    available = available_bytes(example.device)
    if available is not None and available < bytes_each:
        needed = f"may require {bytes_each / 1e9:.1f} GB"
        raise SkippedError(f"skipped: {needed}, {available / 1e9:.1f} GB available")


def _try_candidate(
    result: AutotuneResult,
    name: str,
    make: Callable[[], BuildResult],
    example: Tensor,
    check: Callable[[Tensor], None],
    clock: Clock,
) -> None:
    """Build and check a candidate; it replaces the incumbent in `result` if it is faster."""
    begin = clock()
    with captured_warnings.capture("ignore"):  # of compilers, about their own tracing
        built = make()
        synchronize(example.device)
        result.build_s[name] = clock() - begin
        check(built.forward(example))
        if result.built is None:
            result.name, result.built = name, built
            return
        incumbent_s, speedup = _compare(result.built.forward, built.forward, example, clock)
    if not result.times_s:
        result.times_s[result.name] = incumbent_s
    # Relative to the paired incumbent: times of different comparisons are not comparable.
    result.times_s[name] = result.times_s[result.name] / speedup
    if speedup > MIN_SPEEDUP:
        result.name, result.built = name, built


def _compare(
    incumbent: ForwardFn, candidate: ForwardFn, example: Tensor, clock: Clock
) -> tuple[float, float]:
    """Median seconds of the incumbent, and the candidate's median speedup over paired calls."""
    rounds: list[tuple[float, float]] = []
    begin = clock()
    for of_incumbent, of_candidate in interleaved(
        [partial(incumbent, example), partial(candidate, example)],
        warmup=0,  # `interleaved` makes an untimed call before each timed one
        min_rounds=MIN_ROUNDS,
        min_seconds=MAX_SECONDS,
        synchronize=lambda: synchronize(example.device),
        clock=clock,
    ):
        rounds.append((of_incumbent.seconds, of_candidate.seconds))
        if is_decided([one / another for one, another in rounds], clock() - begin):
            break
    incumbent_s = statistics.median(one for one, _ in rounds)
    return incumbent_s, statistics.median(one / another for one, another in rounds)


def is_decided(ratios: list[float], elapsed: float) -> bool:
    """Whether a comparison can stop after these per-round ratios and `elapsed` seconds."""
    if len(ratios) >= 2 and (min(ratios) > CLEAR or max(ratios) < 1 / CLEAR):
        return True
    is_close = 1 / CLOSE < statistics.median(ratios) < CLOSE
    return len(ratios) >= MIN_ROUNDS and elapsed >= (MAX_SECONDS if is_close else MIN_SECONDS)
