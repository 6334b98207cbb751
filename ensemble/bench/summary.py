"""Measurements of a case -> its statistics: one row of the table. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log1p
from typing import Any

from ensemble.bench.case import Case
from ensemble.bench.environment import Environment
from ensemble.bench.load import record
from ensemble.bench.load.record import LoadTest
from ensemble.bench.measurement import OK, Measurement, Note, RankTimes, Roofline
from ensemble.statistics import (
    TOO_NOISY,
    TOO_WIDE,
    LogMean,
    between_process_interval,
    bootstrap_interval,
    bootstrap_ratio_interval,
    half_width,
    iqr,
    log_mean,
    median,
    of_interval,
)
from ensemble.strategies import STRATEGIES

# Share of the CPU that other processes may use before a row carries a warning, and before its
# speedup is inconclusive: a preempted thread stalls all that wait for it. When another program kept
# one of two cores busy, a loop of many short kernels once took 200 times as long as one long call.
BUSY, TOO_BUSY = 0.05, 0.25
# By how much the fastest calls of strategy and reference must differ to claim `faster` all the
# same: contention slows the fastest calls least. See bench/README.md.
FAR = 5.0
INTERFERENCE = 0.05  # of the reference's time: if a strategy slows it by more, that counts
CPU_BUSY, TOO_NOISY_TO_SAY, TOO_FEW = "CPU busy", "too noisy", "too few pairs"


@dataclass(frozen=True)
class Summary:
    """A case and its measurements; every statistic is derived from them."""

    case: Case
    measurements: tuple[Measurement, ...] = ()
    roofline: Roofline | None = None

    @cached_property
    def _not_ok(self) -> tuple[int, Measurement] | None:
        found = enumerate(self.measurements)
        return next(((index, one) for index, one in found if one.status != OK), None)

    @property
    def status(self) -> str:
        """`ok`, or the status of the first measurement that is not."""
        return self._not_ok[1].status if self._not_ok else OK

    @property
    def error(self) -> str | None:
        """Why the status is not `ok`, and in which process where it was not the first."""
        if self._not_ok is None:
            return None
        index, one = self._not_ok
        return f"in process {index + 1}: {one.error}" if index else one.error

    @property
    def processes(self) -> tuple[Measurement, ...]:
        """The measurements in which the strategy started."""
        return tuple(one for one in self.measurements if one.is_measured)

    @property
    def picked(self) -> str | None:
        """The strategy that `best` chose, in its first process for all."""
        return next(iter(self._known("picked")), None)

    @property
    def name(self) -> str:
        """The strategy, and which it picked."""
        return f"{self.case.strategy} ({self.picked})" if self.picked else self.case.strategy

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """The notes of all measurements, each text once."""
        notes: dict[str, Note] = {}
        for one in self.measurements:
            for note in one.notes:
                notes.setdefault(note.text, note)
        of_roofline = (self.roofline.problem, self.roofline.note) if self.roofline else ()
        return (*map(str, notes.values()), *filter(None, of_roofline))

    @property
    def max_rel_error(self) -> float | None:
        return max(self._known("max_rel_error"), default=None)

    @property
    def error_float64(self) -> float | None:
        return max(self._known("error_float64"), default=None)

    @property
    def top1(self) -> list[list[int]] | None:
        return next(iter(self._known("top1")), None)

    @property
    def top1_agreement(self) -> float | None:
        return min(self._known("top1_agreement"), default=None)

    @cached_property
    def times_s(self) -> tuple[float, ...]:
        return tuple(time for one in self.measurements for time in one.times_s)

    @cached_property
    def reference_times_s(self) -> tuple[float, ...]:
        return tuple(time for one in self.measurements for time in one.reference_times_s)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Reference time / strategy time of all pairs."""
        return tuple(ratio for one in self.measurements for ratio in one.ratios)

    @property
    def _starts(self) -> tuple[Measurement, ...]:
        """The measurements whose build and first call count. Of a strategy that Inductor compiles
        only the first: later processes read what it compiled from a cache on disk."""
        known = tuple(one for one in self.measurements if one.build_s is not None)
        strategy = STRATEGIES.get(self.picked or self.case.strategy)
        return known[:1] if strategy is not None and strategy.uses_inductor else known

    @property
    def build_s(self) -> float | None:
        """Median build time, plus the time to choose a strategy, which one process spent; see
        `_starts`."""
        built = median([(one.build_s or 0.0) - (one.tune_s or 0.0) for one in self._starts])
        return None if built is None else built + (self.tune_s or 0.0)

    @property
    def tune_s(self) -> float | None:
        return median(self._known("tune_s"))

    @property
    def first_call_s(self) -> float | None:
        return median([one.first_call_s for one in self._starts if one.first_call_s is not None])

    @property
    def start_s(self) -> float | None:
        """Time before the steady state: build and first call."""
        both = self.build_s, self.first_call_s
        return None if both[0] is None or both[1] is None else both[0] + both[1]

    @property
    def peak_memory_bytes(self) -> int | None:
        return max(self._known("peak_memory_bytes"), default=None)

    @property
    def peak_reserved_bytes(self) -> int | None:
        return max(self._known("peak_reserved_bytes"), default=None)

    @property
    def held_bytes(self) -> int | None:
        return max(self._known("held_bytes"), default=None)

    @property
    def bytes_per_model(self) -> int | None:
        return max(self._known("bytes_per_model"), default=None)

    @property
    def device_median_s(self) -> float | None:
        """The median time of a call between two events on the device's stream."""
        return median([time for one in self.measurements for time in one.device_times_s])

    @property
    def with_copies_s(self) -> float | None:
        """The time of a call from pinned host memory to logits on the host."""
        return median(self._known("with_copies_s"))

    @property
    def page_faults_per_call(self) -> float | None:
        return median(self._known("page_faults_per_call"))

    @property
    def reference_page_faults_per_call(self) -> float | None:
        return median(self._known("reference_page_faults_per_call"))

    @property
    def others_cpu_share(self) -> float | None:
        return median(self._known("others_cpu_share"))

    @cached_property
    def median_s(self) -> float | None:
        return median(self.times_s)

    @cached_property
    def reference_median_s(self) -> float | None:
        """The median time of the reference that the speedup is over."""
        if not self.is_over_reference_alone:
            return median(self.reference_times_s)
        return median([t for one in self.measurements for t in one.reference_alone_times_s])

    @cached_property
    def slowdown_of_reference(self) -> LogMean | None:
        """Time of the reference in the pairs / alone: over processes, or of the calls of one.

        None unless every process has both.
        """
        timed = [one for one in self.measurements if one.times_s]
        known = self._known("slowdown_of_reference")
        if len(known) < len(timed):
            return None
        if len(timed) != 1:
            return log_mean(known)
        (one,) = timed
        interval = bootstrap_ratio_interval(one.reference_times_s, one.reference_alone_times_s)
        return of_interval(interval) if interval else None

    @cached_property
    def is_over_reference_alone(self) -> bool:
        """Is the speedup over the reference alone, because the strategy slows it in the pairs?"""
        slowdown = self.slowdown_of_reference
        if slowdown is None:
            return False
        return slowdown.interval()[0] > 1 and slowdown.mean > log1p(INTERFERENCE)

    @cached_property
    def iqr_s(self) -> float | None:
        return iqr(self.times_s)

    @cached_property
    def speedup(self) -> float | None:
        """Time of the reference / time of the strategy: the median over processes.

        1 for the reference.
        """
        if self.case.is_reference and self.times_s:
            return 1.0
        return median(self.process_speedups) if self.status == OK else None

    @cached_property
    def speedup_interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval over processes; of one process, a bootstrap of its calls."""
        if self.status != OK:
            return None
        if len(self.process_speedups) == 1:
            measured = next(one for one in self.measurements if one.times_s)
            return measured.speedup_interval(alone=self.is_over_reference_alone)
        return between_process_interval(self.process_speedups)

    @cached_property
    def log_speedup(self) -> LogMean | None:
        """The mean logarithm of the speedup, of conclusive rows: to compare rows with each other.

        Over processes; of one process, from the bootstrap of its pairs.
        """
        if self.inconclusive or self.speedup is None:
            return None
        interval = self.speedup_interval
        if len(self.process_speedups) > 1:
            return log_mean(self.process_speedups)
        return of_interval(interval) if interval else None

    @cached_property
    def log_time(self) -> LogMean | None:
        """The mean logarithm of the time of a call over processes; of one process, of its calls."""
        times = [time for one in self.measurements if (time := median(one.times_s))]
        if len(times) > 1:
            return log_mean(times)
        interval = bootstrap_interval(self.times_s)
        return of_interval(interval) if interval else None

    @cached_property
    def process_speedups(self) -> tuple[float, ...]:
        """The speedup that each process measured."""
        alone = self.is_over_reference_alone
        found = (one.speedup(alone=alone) for one in self.measurements)
        return tuple(speedup for speedup in found if speedup is not None)

    @cached_property
    def within_processes(self) -> float | None:
        """Half-width of the confidence interval within a process, the median over processes."""
        alone = self.is_over_reference_alone
        intervals = (one.speedup_interval(alone=alone) for one in self.measurements)
        return median([half_width(interval) for interval in intervals if interval is not None])

    @cached_property
    def between_processes(self) -> float | None:
        """Half the range of the processes' speedups, as a share of its middle."""
        speedups = self.process_speedups
        return half_width((min(speedups), max(speedups))) if len(speedups) > 1 else None

    @property
    def load_tests(self) -> tuple[LoadTest, ...]:
        return tuple(self._known("load"))

    @cached_property
    def load(self) -> LoadTest | None:
        """The load test of the process with the median sustained rate."""
        return record.median_test(self.load_tests)

    @property
    def ranks(self) -> RankTimes | None:
        return next(iter(self._known("ranks")), None)

    @property
    def roofline_share(self) -> float | None:
        """Least time that the device's measured limits allow / median time."""
        least_s = self.roofline.least_s if self.roofline else None
        return least_s / self.median_s if least_s and self.median_s else None

    @cached_property
    def noise(self) -> float | None:
        """The largest interquartile range / median of times, of strategy and reference, within a
        process."""
        spreads = [
            spread / middle
            for one in self.measurements
            for times in (one.times_s, one.reference_times_s)
            if (spread := iqr(times)) is not None and (middle := median(times))
        ]
        return max(spreads, default=None)

    @property
    def inconclusive(self) -> str | None:
        """Why the speedup cannot be claimed, or None where it can (or where there is none)."""
        if self.speedup is None or self.case.is_reference:
            return None
        if self.speedup_interval is None:
            return TOO_FEW
        if (self.others_cpu_share or 0.0) > TOO_BUSY:
            return CPU_BUSY
        if len(self.process_speedups) > 1:  # noise between processes widens the interval
            is_noisy = half_width(self.speedup_interval) > TOO_WIDE
        else:
            is_noisy = self.noise is not None and self.noise > TOO_NOISY
        return TOO_NOISY_TO_SAY if is_noisy else None

    @property
    def beyond_contention(self) -> str | None:
        """`faster` or `slower` where the CPU was too busy for a figure, but the fastest calls, and
        the whole interval, differ by more than other processes can explain."""
        interval = self.speedup_interval
        if self.inconclusive != CPU_BUSY or interval is None:
            return None
        ratio = min(self.reference_times_s) / min(self.times_s)
        if min(ratio, interval[0]) > FAR:
            return "faster"
        return "slower" if max(ratio, interval[1]) < 1 / FAR else None

    def _known(self, field: str) -> list[Any]:
        values = [getattr(one, field) for one in self.measurements]
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class Run:
    """A run as its result file holds it. `config` is plain data: it is shown and compared."""

    environment: Environment
    config: Mapping[str, Any]
    results: tuple[Summary, ...]


def merged(summary: Summary | None, measurement: Measurement) -> Summary:
    """The summary with a further measurement of its case."""
    before: Sequence[Measurement] = summary.measurements if summary else ()
    roofline = summary.roofline if summary else None
    return Summary(measurement.case, (*before, measurement), roofline)
