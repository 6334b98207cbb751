"""A run beside an earlier one, row by row: is a strategy surely slower than it was? No torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ensemble.bench.case import Case
from ensemble.bench.environment import Environment
from ensemble.bench.measurement import Measurement
from ensemble.bench.report.words import case_name
from ensemble.bench.summary import Run, Summary
from ensemble.errors import InputError
from ensemble.statistics import (
    CONFIDENCE,
    MIN_PAIRS_FOR_INTERVAL,
    between_process_interval,
    modes,
    percentile_interval,
    resampled_medians,
)

# What makes a machine: figures of two that differ here are never set beside each other.
MACHINE = ("platform", "device", "device_name", "cpu_capability", "cores", "ranks", "backend")
# What a run can be made with: a difference is said.
SETTINGS = (
    "python torch torchvision threads tf32 cudnn_benchmark allocator weights".split()  # noqa: SIM905
)
# As above, of the configuration.
OPTIONS = ("arch", "warmup", "min_seconds", "min_pairs", "seed", "reduce")
BEFORE = {"reduce": "none"}  # of files that are older than the option
# Which of its modes a run meets how often is chance, and no difference of the code: such a row's
# interval is that between the processes that differ least and most.
TWO_MODES, TOO_FEW = "two modes", "too few pairs"
PLACE = ("batch", "px", "dtype")  # what a case is told by, beside its strategy and N


@dataclass(frozen=True)
class Comparison:
    """One row against its old self. `ratio` is new time / old time: above 1 it is slower.

    A strategy's time counts in times of the reference beside it, so that a machine that is slower
    today is not a strategy that is; the reference's own in seconds. `interval` is of a confidence
    that all rows of the comparison have together.
    """

    row: Summary
    ratio: float | None
    interval: tuple[float, float] | None
    not_judged: str | None = None  # why not, of either run

    def surely_slower(self, percent: float) -> bool:
        """Is the whole interval above `percent` more?

        A machine that is busy or noisy widens the interval, and excuses no slowdown beyond it. The
        reference is never judged by itself.
        """
        if self.row.case.is_reference or self.interval is None:
            return False
        return self.interval[0] > 1 + percent / 100

    def passes(self, percent: float) -> bool:
        """Is it known to be no slower than allowed? False too where that cannot be judged."""
        judged = self.not_judged is None and self.interval is not None
        return judged and not self.surely_slower(percent)


def compare(new: Run, old: Run) -> list[Comparison]:
    """Every row of `new` that `old` has too, and that was timed in both.

    The intervals hold together, all rows at once, with `CONFIDENCE`: what each may miss is divided
    by the number of rows (Bonferroni), so that many rows are no more often wrong than one.
    """
    before = {row.case: row for row in old.results if row.times_s}
    both = [(row, before[row.case]) for row in new.results if row.times_s and row.case in before]
    judged = sum(not row.case.is_reference for row, _ in both)
    confidence = 1 - (1 - CONFIDENCE) / max(1, judged)
    return [_compare(row, earlier, confidence) for row, earlier in both]


def check_machine(here: Environment, other: Environment, *, argument: str, path: str) -> None:
    """Raise InputError unless a file comes from this machine."""
    for name in MACHINE:
        ours, theirs = getattr(here, name), getattr(other, name)
        if ours != theirs:
            raise InputError(
                f"expected a file of this machine, found another in {path}: {name} {theirs},"
                f" here {ours}",
                argument=argument,
            )


def differences(new: Run, old: Run) -> list[str]:
    """What the two runs were made with differently: `"torch: 2.14.1, was 2.13.0"`."""
    values = [
        (name, getattr(new.environment, name), getattr(old.environment, name)) for name in SETTINGS
    ]
    values += [(name, _option(new, name), _option(old, name)) for name in OPTIONS]
    return [f"{name}: {ours}, was {theirs}" for name, ours, theirs in values if ours != theirs]


def _option(run: Run, name: str) -> Any:
    return run.config.get(name, BEFORE.get(name))


def ratio_interval_of_processes(
    new: Sequence[float], old: Sequence[float], confidence: float
) -> tuple[float, float] | None:
    """The `confidence` interval of the ratio of what many processes of either run would say.

    One value for each process. Both are independent: on the logarithms the half widths of their own
    intervals (`statistics.between_process_interval`) add as errors do, by squares. None where
    either has fewer than two processes.
    """
    intervals = [between_process_interval(medians, confidence) for medians in (new, old)]
    if intervals[0] is None or intervals[1] is None:
        return None
    halves = [np.log(high / low) / 2 for low, high in intervals]  # type: ignore[misc]
    middle = float(np.median(new) / np.median(old))
    spread = float(np.exp(np.hypot(*halves)))
    return middle / spread, middle * spread


def ratio_interval(
    new: Sequence[float], old: Sequence[float], confidence: float
) -> tuple[float, float] | None:
    """The same of two runs of one process each, by their calls: they say nothing of others.

    A percentile bootstrap of median(new) / median(old), each sample by itself. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), chapters 8.3 (two samples) and 13
    (percentiles). None where either has fewer than `MIN_PAIRS_FOR_INTERVAL` values.
    """
    if min(len(new), len(old)) < MIN_PAIRS_FOR_INTERVAL:
        return None
    generator = np.random.default_rng(0)
    above, below = (resampled_medians(values, generator) for values in (new, old))
    return percentile_interval(above / below, confidence)


def not_judged(
    comparisons: Sequence[Comparison],
    new: Run,
    old: Run,
    percent: float,
    asked: Collection[Case] = (),
) -> list[str]:
    """The cases that a gate at `percent` can say nothing of, with the reason: timed in one of the
    runs alone, or not surely enough. `asked` are those of the new run beside its rows."""
    compared = {comparison.row.case for comparison in comparisons}
    wanted = {row.case for row in new.results}.union(asked)
    found = {
        comparison.row.case: comparison.not_judged or TOO_FEW
        for comparison in comparisons
        if not comparison.passes(percent) and not comparison.surely_slower(percent)
    }
    for run, reason in ((new, "not in the baseline"), (old, "not timed now")):
        timed = {row.case for row in run.results if row.times_s and row.case in wanted}
        found |= dict.fromkeys(sorted(timed - compared, key=str), reason)
    return [
        f"{case_name(case, PLACE)} ({reason})"
        for case, reason in found.items()
        if not case.is_reference
    ]


def render(
    comparisons: Sequence[Comparison],
    new: Run,
    old: Run,
    fail_above: float | None = None,
    asked: Collection[Case] = (),
) -> str:
    """What to print of a comparison: a line a row, and what differs between the runs."""
    lines = [
        f"Baseline of {old.environment.date}, commit {old.environment.git_commit}; in brackets"
        f" {CONFIDENCE:.0%} intervals that hold for all rows together:"
    ]
    lines += [f"  differs in {difference}" for difference in differences(new, old)]
    lines += [f"  {_sentence(comparison, fail_above)}" for comparison in comparisons]
    missing = {row.case for row in new.results} - {
        comparison.row.case for comparison in comparisons
    }
    if missing:
        names = "; ".join(case_name(case, PLACE) for case in sorted(missing, key=str))
        lines.append(f"  without times in both runs, not compared: {names}")
    if fail_above is not None:
        open_cases = not_judged(comparisons, new, old, fail_above, asked)
        reasons = "; ".join(open_cases)
        lines += [f"Not judged by --fail_above {fail_above:g}: {reasons}"] if open_cases else []
    return "\n".join(lines) + "\n"


def _compare(row: Summary, old: Summary, confidence: float) -> Comparison:
    several = min(len(row.processes), len(old.processes)) > 1
    if several:
        medians, before = _medians(row), _medians(old)
        interval = ratio_interval_of_processes(medians, before, confidence)
    else:
        medians, before = _times(row.processes[0]), _times(old.processes[0])
        interval = ratio_interval(medians, before, confidence)
    ratio = float(np.median(medians) / np.median(before))
    why_not = _not_judged(row) or _not_judged(old)
    if why_not == TWO_MODES:
        interval = min(medians) / max(before), max(medians) / min(before)
    return Comparison(row, ratio, interval, why_not)


def _not_judged(row: Summary) -> str | None:
    return row.inconclusive or (TWO_MODES if len(modes(_medians(row))) > 1 else None)


def _medians(row: Summary) -> list[float]:
    """The median of each process that timed something."""
    return [float(np.median(_times(process))) for process in row.processes if process.times_s]


def _times(process: Measurement) -> list[float]:
    """In seconds for a row without pairs, else in times of the reference of the same pair."""
    pairs = zip(process.times_s, process.reference_times_s, strict=False)
    return [time / other for time, other in pairs] or list(process.times_s)


def _sentence(comparison: Comparison, fail_above: float | None) -> str:
    row, interval = comparison.row, comparison.interval
    name = case_name(row.case, PLACE)
    measure = "time per call" if row.case.is_reference else "time per call / that of the loop"
    if interval is None:
        return (
            f"{name}: {measure} is {comparison.ratio:.3f} of what it was: too few pairs to be sure"
        )
    low, high = interval
    verdict = "no sure difference"
    if fail_above is not None and comparison.surely_slower(fail_above):
        but = f", although {comparison.not_judged}" if comparison.not_judged else ""
        verdict = f"surely slower{but}"
    elif comparison.not_judged:
        verdict = f"{comparison.not_judged}, not judged"
    elif low > 1 or high < 1:
        verdict = "surely slower" if low > 1 else "surely faster"
    return (
        f"{name}: {measure} is {comparison.ratio:.3f} of what it was"
        f" ({low:.3f} to {high:.3f}): {verdict}"
    )


assert set(MACHINE) | set(SETTINGS) <= {field.name for field in fields(Environment)}
