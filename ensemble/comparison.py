"""A run beside an earlier one, row by row: is a strategy surely slower than it was? No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ensemble.errors import InputError
from ensemble.exports import Run
from ensemble.results import (
    CONFIDENCE,
    MIN_PAIRS_FOR_INTERVAL,
    Environment,
    Result,
    percentile_interval,
    resampled_medians,
)

# What makes a machine: figures of two that differ here are never set beside each other.
MACHINE = ("platform", "device", "device_name", "cpu_capability", "cores")
# What a run can be made with: a difference is said.
SETTINGS = (
    "python torch torchvision threads tf32 cudnn_benchmark allocator weights".split()  # noqa: SIM905
)
# As above, of the configuration.
OPTIONS = ("arch", "warmup", "min_seconds", "min_pairs", "seed")


@dataclass(frozen=True)
class Comparison:
    """One row against its old self. `ratio` is new time / old time: above 1 it is slower.

    A strategy's time counts in times of the reference beside it, so that a machine that is slower
    today is not a strategy that is; the reference's own in seconds.
    """

    row: Result
    ratio: float | None
    interval: tuple[float, float] | None

    def surely_slower(self, percent: float) -> bool:
        """Is the whole interval above `percent` more? The reference alone is never judged."""
        limit = 1 + percent / 100
        return not self.row.is_reference and self.interval is not None and self.interval[0] > limit


def compare(new: Run, old: Run) -> list[Comparison]:
    """Every row of `new` that `old` has too, and that was timed in both."""
    before = {row.key: row for row in old.results}
    pairs = [(row, before[row.key]) for row in new.results if row.key in before]
    return [_compare(row, other) for row, other in pairs if row.times_s and other.times_s]


def check_machine(here: Environment, other: Environment, *, flag: str, path: str) -> None:
    """Raise InputError unless a file comes from this machine."""
    for name in MACHINE:
        ours, theirs = getattr(here, name), getattr(other, name)
        if ours != theirs:
            raise InputError(
                f"{flag}: expected a file of this machine, found another in {path}:"
                f" {name} {theirs}, here {ours}"
            )


def differences(new: Run, old: Run) -> list[str]:
    """What the two runs were made with differently: `"torch: 2.14.1, was 2.13.0"`."""
    pairs = [
        (name, getattr(new.environment, name), getattr(old.environment, name)) for name in SETTINGS
    ]
    pairs += [(name, new.config.get(name), old.config.get(name)) for name in OPTIONS]
    return [f"{name}: {ours}, was {theirs}" for name, ours, theirs in pairs if ours != theirs]


def ratio_interval(new: Sequence[float], old: Sequence[float]) -> tuple[float, float] | None:
    """The `CONFIDENCE` percentile bootstrap interval of median(new) / median(old).

    The samples are independent, and each is resampled by itself. Source: Efron and Tibshirani, An
    Introduction to the Bootstrap (1993), chapters 8.3 (two samples) and 13 (percentiles). None
    where either has fewer than 8 values.
    """
    if min(len(new), len(old)) < MIN_PAIRS_FOR_INTERVAL:
        return None
    generator = np.random.default_rng(0)
    above, below = (resampled_medians(values, generator) for values in (new, old))
    return percentile_interval(above / below)


def render(comparisons: Sequence[Comparison], new: Run, old: Run) -> str:
    """What to print of a comparison: a line a row, and what differs between the runs."""
    lines = [f"Baseline of {old.environment.date}, commit {old.environment.git_commit}:"]
    lines += [f"  differs in {difference}" for difference in differences(new, old)]
    lines += [f"  {_sentence(comparison)}" for comparison in comparisons]
    missing = {row.key for row in new.results} - {own.row.key for own in comparisons}
    if missing:
        names = ", ".join(f"{key[0]} N={key[1]}" for key in sorted(missing))
        lines.append(f"  without times in both runs, not compared: {names}")
    return "\n".join(lines) + "\n"


def _compare(row: Result, old: Result) -> Comparison:
    new_times, old_times = _times(row), _times(old)
    ratio = float(np.median(new_times) / np.median(old_times))
    return Comparison(row, ratio, ratio_interval(new_times, old_times))


def _times(row: Result) -> Sequence[float]:
    """In seconds for a row without pairs, else in times of the reference of the same pair."""
    if not row.reference_times_s:
        return row.times_s
    return [own / other for own, other in zip(row.times_s, row.reference_times_s, strict=True)]


def _sentence(comparison: Comparison) -> str:
    row, interval = comparison.row, comparison.interval
    name = (
        f"{row.strategy}, {row.num_models} models, batch {row.batch_size}, {row.image_size} px,"
        f" {row.dtype}"
    )
    measure = "time" if row.is_reference else "time in times of the reference"
    if interval is None:
        return f"{name}: {measure} {comparison.ratio:.3f} of what it was, too few pairs to be sure"
    low, high = interval
    verdict = "no sure difference"
    if low > 1 or high < 1:
        verdict = "surely slower" if low > 1 else "surely faster"
    return (
        f"{name}: {measure} {comparison.ratio:.3f} of what it was, {CONFIDENCE:.0%} interval"
        f" {low:.3f} to {high:.3f} (bootstrap of two samples): {verdict}"
    )


assert set(MACHINE) | set(SETTINGS) <= {field.name for field in fields(Environment)}
