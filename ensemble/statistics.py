"""Statistics of run times: medians, spreads, confidence intervals and noise thresholds."""

from collections.abc import Sequence
from itertools import pairwise
from math import comb

import numpy as np

CONFIDENCE = 0.95
LOAD_CONFIDENCE = 0.99  # that the latency percentile is met, as in LoadGen
RESAMPLES = 10_000
# Below n = 6 values there is no distribution-free 95 % interval of the median: even the full range
# of 5 values covers it too rarely (1 - 2 / 2**5 < 0.95 < 1 - 2 / 2**6).
MIN_PAIRS_FOR_INTERVAL = 6
# Thresholds on the inter-quartile range relative to the median, as in torch.utils.benchmark.
NOISY, TOO_NOISY = 0.10, 0.25
# Maximum half-width of the between-process interval relative to its center. Above it the bounds
# differ by a factor of four or more, and a point estimate would not be reproducible.
TOO_WIDE = 0.60


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def iqr(values: Sequence[float]) -> float | None:
    """Inter-quartile range with linear interpolation; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, high = np.percentile(values, (25, 75))
    return float(high - low)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the median at level `CONFIDENCE`; None for fewer values than
    `MIN_PAIRS_FOR_INTERVAL`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. The seed is
    fixed, so that a result file always yields the same interval.
    """
    if len(values) < MIN_PAIRS_FOR_INTERVAL:
        return None
    return percentile_interval(resampled_medians(values, np.random.default_rng(0)))


def resampled_medians(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Medians `(RESAMPLES,)` of samples with replacement, each of the size of `values`."""
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    medians: np.ndarray = np.median(np.asarray(values)[picks], axis=1)
    return medians


def percentile_interval(
    resampled: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The central interval that contains a `confidence` fraction of resampled statistics."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, (tail, 100 - tail))
    return float(low), float(high)


# Medians are bimodal if the gap between the modes exceeds this fraction and this multiple of the
# spread within a mode.
MODE_GAP, MODE_GAP_TO_SPREAD = 0.10, 2.0


def between_process_interval(
    medians: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Confidence interval of the central speedup over processes; None for fewer than two.

    Each value, positive, is the median of one process's pairs. The process is the level at which
    runs differ, and the within-process variance is contained in it. Computed on logarithms, as the
    wider of two intervals: Student's t interval of the mean (Kalibera and Jones, Rigorous
    Benchmarking in Reasonable Time, ISMM 2013, section 6), exact for normally distributed
    processes; and the range over all processes, which covers the median of any distribution, also
    of a bimodal one, with probability 1 - 2 / 2**n.
    """
    if len(medians) < 2:
        return None
    from scipy.special import stdtrit  # lazily: the import takes 0.1 s

    logs = np.log(medians)
    quantile = stdtrit(len(logs) - 1, (1 + confidence) / 2)  # of Student's t distribution
    half = float(quantile * logs.std(ddof=1)) / len(logs) ** 0.5
    center = float(logs.mean())
    low, high = min(center - half, float(logs.min())), max(center + half, float(logs.max()))
    return float(np.exp(low)), float(np.exp(high))


def half_width(interval: tuple[float, float]) -> float:
    """Half of the width of an interval, relative to its center."""
    return (interval[1] - interval[0]) / (interval[1] + interval[0])


def modes(medians: Sequence[float]) -> list[list[int]]:
    """The process indices of each mode, the larger mode first: one list, or two if bimodal.

    Bimodal: the largest gap between neighboring medians exceeds `MODE_GAP` and
    `MODE_GAP_TO_SPREAD` times the spread of the values on either side of it. Needs at least three
    processes.
    """
    order = sorted(range(len(medians)), key=medians.__getitem__)
    if len(order) < 3:
        return [order]
    logs = [float(np.log(medians[index])) for index in order]
    gaps = [after - before for before, after in pairwise(logs)]
    at = max(range(len(gaps)), key=gaps.__getitem__) + 1
    spread = max(logs[at - 1] - logs[0], logs[-1] - logs[at])
    if gaps[at - 1] <= max(float(np.log1p(MODE_GAP)), MODE_GAP_TO_SPREAD * spread):
        return [order]
    return sorted([order[:at], order[at:]], key=len, reverse=True)


def queries_needed(share: float, late: int) -> int:
    """LoadGen's minimum query count: the fewest queries of which `late` may exceed the latency
    bound that a fraction `share` of them must meet.

    With fewer queries, a system that violates the bound would pass by chance in more than 1 % of
    runs: the probability of at most `late` overlatency queries, each of probability 1 - share. 459
    for the 99th percentile with none late, 64 for the 90th with one. Source: the early stopping
    criterion in the appendix of the MLPerf Inference rules.
    """
    number = late + 1
    while _at_most(late, number, 1 - share) > 1 - LOAD_CONFIDENCE:
        number += max(1, number // 200)
    while _at_most(late, number - 1, 1 - share) <= 1 - LOAD_CONFIDENCE:
        number -= 1
    return number


def _at_most(most: int, number: int, chance: float) -> float:
    """The binomial probability of at most `most` successes in `number` trials."""
    return sum(comb(number, k) * chance**k * (1 - chance) ** (number - k) for k in range(most + 1))
