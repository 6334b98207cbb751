"""Medians, spreads and confidence intervals of times, and thresholds of noise."""

from collections.abc import Sequence
from itertools import pairwise
from math import comb

import numpy as np

CONFIDENCE = 0.95
LOAD_CONFIDENCE = 0.99  # that a percentile under load is kept: LoadGen's
RESAMPLES = 10_000
# A 95 % interval of a median needs 6 values: the whole range of 5 values covers the median less
# often (1 - 2 / 2**5 < 0.95 < 1 - 2 / 2**6).
MIN_PAIRS_FOR_INTERVAL = 6
# Thresholds on the interquartile range over the median, as in torch.utils.benchmark.
NOISY, TOO_NOISY = 0.10, 0.25
# Half-width of an interval over processes, as a share of its middle. Above, its ends differ by a
# factor of four or more, and the next run would not reproduce its middle.
TOO_WIDE = 0.60


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def iqr(values: Sequence[float]) -> float | None:
    """Interquartile range, linear interpolation; unknown for fewer than two values."""
    if len(values) < 2:
        return None
    low, high = np.percentile(values, (25, 75))
    return float(high - low)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The `CONFIDENCE` percentile bootstrap interval of the median; None for fewer values than
    `MIN_PAIRS_FOR_INTERVAL`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Values are
    resampled with a fixed seed, so that one result file always gives one interval.
    """
    if len(values) < MIN_PAIRS_FOR_INTERVAL:
        return None
    return percentile_interval(resampled_medians(values, np.random.default_rng(0)))


def resampled_medians(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """The medians of `RESAMPLES` samples with replacement, each as large as `values`."""
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    medians: np.ndarray = np.median(np.asarray(values)[picks], axis=1)
    return medians


def percentile_interval(
    resampled: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The middle `confidence` of resampled statistics."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return float(low), float(high)


# A bimodal sample has a gap above this share, and above so many times the spread on either side.
APART, TIMES_SPREAD = 0.10, 2.0


def interval_of_processes(
    medians: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The `confidence` interval of what a further process would say, in the middle of many.

    One value above 0 for each process, the median of its pairs: this is the level at which runs
    differ, and what varies within a process is in it. The wider of two, on the logarithms:
    Student's interval of the mean (Kalibera and Jones, Rigorous Benchmarking in Reasonable Time,
    ISMM 2013, section 6), right where processes scatter evenly; and the range of all processes,
    which holds the median of any distribution in 1 - 2 / 2**n of runs, also of one with two modes,
    where Student's does not. None for fewer than two.
    """
    if len(medians) < 2:
        return None
    from scipy.special import stdtrit  # here, for it takes a tenth of a second to import

    logs = np.log(medians)
    quantile = stdtrit(len(logs) - 1, (1 + confidence) / 2)  # of Student's distribution
    half = float(quantile * logs.std(ddof=1)) / len(logs) ** 0.5
    middle = float(logs.mean())
    low, high = min(middle - half, float(logs.min())), max(middle + half, float(logs.max()))
    return float(np.exp(low)), float(np.exp(high))


def half_width(interval: tuple[float, float]) -> float:
    """Half of an interval, as a share of its middle."""
    return (interval[1] - interval[0]) / (interval[1] + interval[0])


def modes(medians: Sequence[float]) -> list[list[int]]:
    """The indices of the processes of each mode, the larger group first: one group, or two.

    Two where the largest gap between neighbours is above `APART` and above `TIMES_SPREAD` times
    what the values on either side of it spread. At least three processes can show that.
    """
    order = sorted(range(len(medians)), key=medians.__getitem__)
    if len(order) < 3:
        return [order]
    logs = [float(np.log(medians[index])) for index in order]
    gaps = [after - before for before, after in pairwise(logs)]
    at = max(range(len(gaps)), key=gaps.__getitem__) + 1
    spread = max(logs[at - 1] - logs[0], logs[-1] - logs[at])
    if gaps[at - 1] <= max(float(np.log1p(APART)), TIMES_SPREAD * spread):
        return [order]
    return sorted([order[:at], order[at:]], key=len, reverse=True)


def queries_needed(share: float, late: int) -> int:
    """The fewest requests of which `late` may miss a bound that a `share` of them is to keep.

    With fewer, a system that misses it would pass by luck in more than 1 % of runs: the chance of
    at most `late` misses, each of chance 1 - share. 459 for a 99th percentile with none late, 64
    for a 90th with one: LoadGen's rule of early stopping (MLPerf Inference rules, appendix).
    """
    number = late + 1
    while _at_most(late, number, 1 - share) > 1 - LOAD_CONFIDENCE:
        number += max(1, number // 200)
    while _at_most(late, number - 1, 1 - share) <= 1 - LOAD_CONFIDENCE:
        number -= 1
    return number


def _at_most(most: int, number: int, chance: float) -> float:
    """The chance of at most `most` successes in `number` draws."""
    return sum(comb(number, k) * chance**k * (1 - chance) ** (number - k) for k in range(most + 1))
