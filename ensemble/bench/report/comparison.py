"""Compare a run with its baseline, row by row: the regression gate. Imports no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from math import exp, inf, log, nan
from typing import Any

from ensemble.bench.case import Case
from ensemble.bench.environment import Environment
from ensemble.bench.measurement import Measurement
from ensemble.bench.report.labels import case_name
from ensemble.bench.summary import Run, Summary
from ensemble.errors import InputError
from ensemble.statistics import (
    CONFIDENCE,
    LogMean,
    bootstrap_interval,
    log_mean,
    median,
    of_interval,
)

# What identifies a machine: runs that differ here are never compared.
MACHINE = ("platform", "device", "device_name", "cpu_capability", "cores", "ranks", "backend")
# Settings of the environment: a difference is reported.
SETTINGS = (
    "python torch torchvision threads tf32 cudnn_benchmark allocator weights".split()  # noqa: SIM905
)
# Settings of the configuration: likewise.
OPTIONS = (
    *("arch", "output", "channels", "warmup", "min_seconds", "min_pairs", "seed", "reduce"),
    "flush_l2",
)
OLD_DEFAULTS = {
    "reduce": "none",
    "flush_l2": False,
    "channels": 3,
    "output": None,
}  # in files older than the option
# Standard deviation between the processes of a row, where a run has one process and cannot know it:
# the 90th percentile of the rows in tests/data.
ASSUMED_SPREAD = 0.10
ONE_PROCESS, TOO_FEW = "one process: raise --processes", "too few pairs"
LABEL_FIELDS = ("batch", "px", "dtype")  # of a case, besides its strategy and N


@dataclass(frozen=True)
class Comparison:
    """A row against its baseline. `ratio` is new time / old time: above 1 it is slower.

    A strategy's time is relative to the reference of its own processes, so that a slower machine is
    not a slower strategy; the reference's own is in seconds. `interval` has one-sided confidence
    bounds, simultaneous ones of all rows of the comparison.
    """

    row: Summary
    ratio: float | None
    interval: tuple[float, float] | None
    inconclusive: str | None = None  # the reason, in either run

    def is_significantly_slower(self, percent: float) -> bool:
        """Is it slower by more than `percent`, and significantly slower?

        A busy or noisy machine widens the interval, but a slowdown beyond it still counts. The
        reference itself is not gated.
        """
        if self.row.case.is_reference or self.interval is None or self.ratio is None:
            return False
        return self.interval[0] > 1 and self.ratio > 1 + percent / 100

    def passes(self, percent: float) -> bool:
        """Is it conclusively no slower than `percent`?"""
        conclusive = self.inconclusive is None and self.interval is not None
        return conclusive and not self.is_significantly_slower(percent)


def compare(new: Run, old: Run) -> list[Comparison]:
    """Compare every row that was timed in both runs.

    Each bound has a confidence of `CONFIDENCE` for all rows together (Sidak, Rectangular confidence
    regions for the means of multivariate normal distributions, 1967): many rows raise no more false
    alarms than one. One-sided, as the gate asks for one direction.
    """
    before = {row.case: row for row in old.results if row.times_s}
    both = [(row, before[row.case]) for row in new.results if row.times_s and row.case in before]
    gated = sum(not row.case.is_reference for row, _ in both)
    confidence = 2 * CONFIDENCE ** (1 / max(1, gated)) - 1
    return [_compare(row, earlier, confidence) for row, earlier in both]


def check_machine(here: Environment, other: Environment, *, argument: str, path: str) -> None:
    """Raise InputError unless a result file comes from this machine."""
    for name in MACHINE:
        ours, theirs = getattr(here, name), getattr(other, name)
        if ours != theirs:
            raise InputError(
                f"expected a result file of this machine, got one of another: {path} has {name}"
                f" {theirs}, this machine {ours}",
                argument=argument,
            )


def differences(new: Run, old: Run) -> list[str]:
    """The settings that differ between two runs: `"torch: 2.14.1, was 2.13.0"`."""
    values = [
        (name, getattr(new.environment, name), getattr(old.environment, name)) for name in SETTINGS
    ]
    values += [(name, _option(new, name), _option(old, name)) for name in OPTIONS]
    return [f"{name}: {ours}, was {theirs}" for name, ours, theirs in values if ours != theirs]


def _option(run: Run, name: str) -> Any:
    return run.config.get(name, OLD_DEFAULTS.get(name))


def mean_of(row: Summary, *, alone: bool) -> LogMean | None:
    """The time of a row relative to the reference, of a reference in seconds.

    Of one process the spread of its calls is known; that between processes is taken to be
    `ASSUMED_SPREAD`. None if it has too few calls.

    alone: relative to the reference alone, else to the paired one.
    """
    times = [_time(process, alone) for process in row.processes if process.times_s]
    if len(times) > 1:
        return log_mean(times)
    process = row.processes[0]
    if row.case.is_reference:
        interval = bootstrap_interval(process.times_s)
    else:
        interval = process.speedup_interval(alone=alone)
    if interval is None:
        return None
    return LogMean(log(times[0]), of_interval(interval).variance + ASSUMED_SPREAD**2, inf)


def _time(process: Measurement, alone: bool) -> float:
    """The time of a process relative to the reference; in seconds for the reference itself."""
    speedup = process.speedup(alone=alone)
    return 1 / speedup if speedup else median(process.times_s) or nan


def inconclusive_cases(
    comparisons: Sequence[Comparison],
    new: Run,
    old: Run,
    percent: float,
    planned: Collection[Case] = (),
) -> list[str]:
    """The cases for which a gate at `percent` is inconclusive, with the reason: too noisy, or timed
    in only one of the runs. `planned` are cases of the new run without a row."""
    compared = {comparison.row.case for comparison in comparisons}
    wanted = {row.case for row in new.results}.union(planned)
    reasons = {
        comparison.row.case: comparison.inconclusive or TOO_FEW
        for comparison in comparisons
        if not comparison.passes(percent) and not comparison.is_significantly_slower(percent)
    }
    for run, reason in ((new, "not in the baseline"), (old, "not timed now")):
        timed = {row.case for row in run.results if row.times_s and row.case in wanted}
        reasons |= dict.fromkeys(sorted(timed - compared, key=str), reason)
    return [
        f"{case_name(case, LABEL_FIELDS)} ({reason})"
        for case, reason in reasons.items()
        if not case.is_reference
    ]


def render(
    comparisons: Sequence[Comparison],
    new: Run,
    old: Run,
    fail_above: float | None = None,
    planned: Collection[Case] = (),
) -> str:
    """The text of a comparison: a line per row, and the settings that differ."""
    lines = [
        f"Baseline of {old.environment.date}, commit {old.environment.git_commit}; simultaneous"
        f" one-sided {CONFIDENCE:.0%} confidence bounds:"
    ]
    lines += [f"  differs in {difference}" for difference in differences(new, old)]
    lines += [f"  {_sentence(comparison, fail_above)}" for comparison in comparisons]
    both = {row.case for run in (new, old) for row in run.results}
    missing = both - {comparison.row.case for comparison in comparisons}
    if missing:
        names = "; ".join(case_name(case, LABEL_FIELDS) for case in sorted(missing, key=str))
        lines.append(f"  not compared, not timed in both runs: {names}")
    if fail_above is not None:
        inconclusive = inconclusive_cases(comparisons, new, old, fail_above, planned)
        reasons = "; ".join(inconclusive)
        lines += (
            [f"Inconclusive for --fail_above {fail_above:g}: {reasons}"] if inconclusive else []
        )
    return "\n".join(lines) + "\n"


def _compare(row: Summary, old: Summary, confidence: float) -> Comparison:
    alone = (row.is_over_reference_alone or old.is_over_reference_alone) and all(
        one.reference_alone_times_s for one in (*row.processes, *old.processes)
    )
    means = mean_of(row, alone=alone), mean_of(old, alone=alone)
    inconclusive = row.inconclusive or old.inconclusive
    if means[0] is None or means[1] is None:
        ratio = _typical(row, alone) / _typical(old, alone)
        return Comparison(row, ratio, None, inconclusive or TOO_FEW)
    quotient = means[0].over(means[1])
    low, high = quotient.interval(confidence)
    if min(len(row.processes), len(old.processes)) == 1 and low <= 1 <= high:
        inconclusive = inconclusive or ONE_PROCESS
    return Comparison(row, exp(quotient.mean), (low, high), inconclusive)


def _typical(row: Summary, alone: bool) -> float:
    return median([_time(one, alone) for one in row.processes if one.times_s]) or nan


def _sentence(comparison: Comparison, fail_above: float | None) -> str:
    row, interval = comparison.row, comparison.interval
    name = case_name(row.case, LABEL_FIELDS)
    what = "time" if row.case.is_reference else "time relative to the loop"
    if interval is None:
        reason = comparison.inconclusive
        return f"{name}: {what} is {comparison.ratio:.3f}x the baseline: inconclusive ({reason})"
    low, high = interval
    verdict = "not significantly different"
    if fail_above is not None and comparison.is_significantly_slower(fail_above):
        caveat = f", although {comparison.inconclusive}" if comparison.inconclusive else ""
        verdict = f"significantly slower{caveat}"
    elif comparison.inconclusive:
        verdict = f"inconclusive ({comparison.inconclusive})"
    elif low > 1 or high < 1:
        verdict = "significantly slower" if low > 1 else "significantly faster"
    return (
        f"{name}: {what} is {comparison.ratio:.3f}x the baseline ({low:.3f}-{high:.3f}): {verdict}"
    )


assert set(MACHINE) | set(SETTINGS) <= {field.name for field in fields(Environment)}
