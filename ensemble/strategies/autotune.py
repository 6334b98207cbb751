"""Which of several ways to the same logits is the fastest here? Each against the fastest so far.

A candidate is built, checked, and timed in turns with the fastest of those before it; the slower of
the two is released at once. So at most two are held, and each is judged by calls that lie right
beside those of the one that it must beat, whatever the machine does meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ensemble.errors import first_line
from ensemble.formatting import milliseconds
from ensemble.machine import captured_warnings
from ensemble.machine.devices import synchronize
from ensemble.machine.memory import available_bytes, release
from ensemble.machine.timing import Clock, interleaved
from ensemble.strategies.build_result import Built, Forward

# A duel lasts so long, and at least so many rounds; while the two are within CLOSE of each other it
# goes on to LONG_S. It ends after two rounds that both say CLEAR.
SHORT_S, LONG_S, LEAST = 0.33, 1.0, 3
CLOSE, CLEAR = 1.08, 1.3
MARGIN = 1.04  # who comes later must win by so much: of equals the first one, the loop, stays


class NotTriedError(RuntimeError):
    """A candidate was not begun."""


@dataclass
class Contest:
    """The fastest so far, what became of each that was tried, and the seconds of each build."""

    name: str = ""
    built: Built | None = None
    times_s: dict[str, float] = field(default_factory=dict)
    out: dict[str, Exception] = field(default_factory=dict)
    build_s: dict[str, float] = field(default_factory=dict)

    @property
    def tried(self) -> str:
        """What was tried, in one line: the milliseconds of a call, and why one is out."""
        times = [f"{name} {milliseconds(seconds)}" for name, seconds in self.times_s.items()]
        out = [f"{name}: {first_line(error)}" for name, error in self.out.items()]
        return "; ".join([", ".join(times), *out] if times else out)


def fastest(
    candidates: Mapping[str, Callable[[], Built]],
    example: Tensor,
    *,
    check: Callable[[Tensor], None],
    seconds: float,
    bytes_each: int = 0,
    clock: Clock = time.perf_counter,
) -> Contest:
    """Try candidates in their order, which is that of equals too.

    One that raises, or that `check` refuses by raising, is out with its reason.

    Args:
        candidates: what each is called, and how it is built.
        check: raises for wrong logits, of the example.
        seconds: none is begun after so long, but the first.
        bytes_each: nor where there is less memory than that: to be killed for it would cost all.

    Raises:
        Exception: what the first one raised, where all raise.
    """
    contest, begin = Contest(), clock()
    for name, make in candidates.items():
        try:
            if contest.built is not None:
                _check_room(example, clock() - begin, seconds, bytes_each)
            _challenge(contest, name, make, example, check, clock)
        except Exception as error:
            contest.out[name] = error.with_traceback(None)  # it holds the frames that hold memory
        if contest.build_s.keys() - {contest.name} or contest.out:
            release()  # what lost, before the next one is built
    if contest.built is None:
        raise next(iter(contest.out.values()))
    return contest


def _check_room(example: Tensor, passed: float, seconds: float, bytes_each: int) -> None:
    """Raise NotTriedError where time is over or memory short."""
    if passed > seconds:
        raise NotTriedError(f"not tried after {seconds:g} s (--tune_seconds)")
    room = available_bytes(example.device)
    if room is not None and room < bytes_each:
        wanted = f"may take {bytes_each / 1e9:.1f}"
        raise NotTriedError(f"not tried: {wanted} GB, {room / 1e9:.1f} GB are left")


def _challenge(
    contest: Contest,
    name: str,
    make: Callable[[], Built],
    example: Tensor,
    check: Callable[[Tensor], None],
    clock: Clock,
) -> None:
    """Build and check one, and let the faster of it and the fastest so far stay."""
    begin = clock()
    with captured_warnings.caught("ignore"):  # of compilers, about their own tracing
        built = make()
        synchronize(example.device)
        contest.build_s[name] = clock() - begin
        check(built.forward(example))
        if contest.built is None:
            contest.name, contest.built = name, built
            return
        times = _duel(contest.built.forward, built.forward, example, clock)
    if not contest.times_s:
        contest.times_s[contest.name] = times[0]
    contest.times_s[name] = times[1]
    if times[2] > MARGIN:
        contest.name, contest.built = name, built


def _duel(
    champion: Forward, challenger: Forward, example: Tensor, clock: Clock
) -> tuple[float, float, float]:
    """The median seconds of both, and of the rounds' ratios: above 1 the challenger is faster."""
    rounds: list[tuple[float, float]] = []
    begin = clock()
    for champions, challengers in interleaved(
        [partial(champion, example), partial(challenger, example)],
        warmup=0,  # the untimed calls before each timed one are enough
        min_rounds=LEAST,
        min_seconds=LONG_S,
        synchronize=lambda: synchronize(example.device),
        clock=clock,
    ):
        rounds.append((champions.seconds, challengers.seconds))
        if is_decided([one / another for one, another in rounds], clock() - begin):
            break
    times = [statistics.median(one) for one in zip(*rounds, strict=True)]
    return times[0], times[1], statistics.median(one / another for one, another in rounds)


def is_decided(ratios: list[float], passed: float) -> bool:
    """Is it known which of two is the faster, as far as it matters?"""
    if len(ratios) >= 2 and (min(ratios) > CLEAR or max(ratios) < 1 / CLEAR):
        return True
    middle = statistics.median(ratios)
    is_close = 1 / CLOSE < middle < CLOSE
    return len(ratios) >= LEAST and passed >= (LONG_S if is_close else SHORT_S)
