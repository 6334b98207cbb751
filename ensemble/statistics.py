"""Statistics of run times: medians, spreads, confidence intervals and noise thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, inf

import numpy as np

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.96  # of the central 95 % of a normal distribution, in standard deviations
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


def bootstrap_ratio_interval(
    above: Sequence[float], below: Sequence[float]
) -> tuple[float, float] | None:
    """As above, of median(above) / median(below): both samples are resampled independently.

    Source: Efron and Tibshirani, chapter 8.3 (two samples).
    """
    if min(len(above), len(below)) < MIN_PAIRS_FOR_INTERVAL:
        return None
    generator = np.random.default_rng(0)
    medians = [resampled_medians(values, generator) for values in (above, below)]
    return percentile_interval(medians[0] / medians[1])


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


@dataclass(frozen=True)
class LogMean:
    """The mean of logarithms over processes: its variance, and the degrees of freedom of that."""

    mean: float
    variance: float
    degrees: float

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Student's confidence interval of the exponential of the mean."""
        from scipy.special import stdtrit  # lazily: the import takes 0.1 s

        quantile = float(stdtrit(self.degrees, (1 + confidence) / 2))
        half = quantile * self.variance**0.5
        return float(np.exp(self.mean - half)), float(np.exp(self.mean + half))

    def over(self, other: "LogMean") -> "LogMean":
        """The quotient of two independent ones, with the degrees of freedom of Welch (The
        generalization of Student's problem, Biometrika 1947)."""
        both = self.variance + other.variance
        spread = self.variance**2 / self.degrees + other.variance**2 / other.degrees
        degrees = both**2 / spread if spread else min(self.degrees, other.degrees)
        return LogMean(self.mean - other.mean, both, degrees)


def log_mean(medians: Sequence[float]) -> LogMean | None:
    """The mean over processes, one positive median of each; None for fewer than two.

    The process is the level at which runs differ, and the within-process variance is contained in
    it: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time (ISMM 2013), section 6. Exact
    for independent log-normal processes. In runs of `MIN_FOR_AUTOCORRELATION` processes or more the
    variance grows with the autocorrelation of successive processes: drift that lasts.
    """
    if len(medians) < 2:
        return None
    logs = np.log(medians)
    variance = float(logs.var(ddof=1)) / len(logs) * _variance_inflation(logs)
    return LogMean(float(logs.mean()), variance, len(logs) - 1.0)


def of_interval(interval: tuple[float, float]) -> LogMean:
    """The log-normal distribution with this central interval at level `CONFIDENCE`."""
    low, high = np.log(interval)
    deviation = float(high - low) / 2 / NORMAL_QUANTILE
    return LogMean(float(high + low) / 2, deviation**2, inf)


# With fewer values the correction would widen intervals of independent values by more than a tenth.
MIN_FOR_AUTOCORRELATION = 12
CLEARLY_AUTOCORRELATED, MAX_AUTOCORRELATION = 0.2, 0.95


def _variance_inflation(values: np.ndarray) -> float:
    """By how much autocorrelation raises the variance of the mean over s**2 / n; at least 1.

    For a first-order autoregressive process, whose coefficient is estimated from the lag-1
    autocorrelation, less its bias of -(1 + 4 rho) / n (Kendall, Note on bias in the estimation of
    autocorrelation, Biometrika 1954). Source of the sum: Bayley and Hammersley, The "effective"
    number of independent observations in an autocorrelated time series (1946).
    """
    count, deviations = len(values), values - values.mean()
    total = float(deviations @ deviations)
    if count < MIN_FOR_AUTOCORRELATION or not total:
        return 1.0
    lag_one = float(deviations[1:] @ deviations[:-1]) / total
    rho = max(0.0, (lag_one + 1 / count) / (1 - 4 / count))
    if rho > CLEARLY_AUTOCORRELATED:  # one standard error more: the estimate is imprecise
        rho += max(0.0, 1 - rho**2) ** 0.5 / count**0.5
    rho = min(rho, MAX_AUTOCORRELATION)
    lags = np.arange(1, count)
    inflation = 1 + 2 * float(((1 - lags / count) * rho**lags).sum())
    return inflation / (1 - (inflation - 1) / (count - 1))  # s**2 is too small by the latter


def between_process_interval(
    medians: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Confidence interval of the central speedup over processes; None for fewer than two.

    Student's, of `log_mean`, widened to contain the median of the processes.
    """
    center = log_mean(medians)
    if center is None:
        return None
    low, high = center.interval(confidence)
    middle = float(np.median(medians))
    return min(low, middle), max(high, middle)


def half_width(interval: tuple[float, float]) -> float:
    """Half of the width of an interval, relative to its center."""
    return (interval[1] - interval[0]) / (interval[1] + interval[0])


# Medians are bimodal if the gap between the modes exceeds this fraction, and this multiple (by the
# number of processes) of the larger spread within a mode: fewer than 2 % of samples of five or more
# from one normal distribution do. Either mode has two processes: one alone may be an accident.
MODE_GAP, MODE_GAP_TO_SPREAD, MIN_OF_A_MODE, MIN_FOR_MODES = 0.10, 20.0, 2, 5


def modes(medians: Sequence[float]) -> list[list[int]]:
    """The process indices of each mode, the larger mode first: one list, or two if bimodal.

    Bimodal: the largest gap between neighboring medians exceeds `MODE_GAP` and
    `MODE_GAP_TO_SPREAD` / n times the spread of the values on either side of it, and either side
    has `MIN_OF_A_MODE` of n. Needs at least `MIN_FOR_MODES` processes.
    """
    order = sorted(range(len(medians)), key=medians.__getitem__)
    logs = [float(np.log(medians[index])) for index in order]
    if len(order) < MIN_FOR_MODES:
        return [order]
    splits = range(MIN_OF_A_MODE, len(order) - MIN_OF_A_MODE + 1)
    at = max(splits, key=lambda split: logs[split] - logs[split - 1])
    gap = logs[at] - logs[at - 1]
    spread = max(logs[at - 1] - logs[0], logs[-1] - logs[at])
    if gap <= max(float(np.log1p(MODE_GAP)), MODE_GAP_TO_SPREAD / len(order) * spread):
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
