"""Statistics against cited and hand-computed values."""

import numpy as np
import pytest

from ensemble.statistics import (
    LogMean,
    between_process_interval,
    bootstrap_interval,
    bootstrap_ratio_interval,
    half_width,
    iqr,
    log_mean,
    median,
    modes,
    of_interval,
)


def test_the_median_and_quartiles_are_those_of_a_hand_computed_list() -> None:
    values = (1.0, 2.0, 3.0, 4.0, 10.0)  # quartiles 2 and 4 by linear interpolation
    assert median(values) == 3.0
    assert iqr(values) == 2.0


def test_statistics_of_too_few_values_are_unknown() -> None:
    assert median(()) is None
    assert iqr((1.0,)) is None
    assert bootstrap_interval((1.0,) * 5) is None


def test_the_bootstrap_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval((2.0,) * 10) == (2.0, 2.0)


def test_the_bootstrap_interval_agrees_with_the_order_statistics_of_a_large_sample() -> None:
    # Conover, Practical Nonparametric Statistics (1999), 3.2: for n = 1000 the 95 % interval of
    # the median lies between the order statistics n/2 -+ 1.96 sqrt(n)/2, here 469 and 531.
    low, high = bootstrap_interval(tuple(float(value) for value in range(1, 1001))) or (0, 0)
    assert low == pytest.approx(469.0, abs=5)
    assert high == pytest.approx(531.0, abs=5)


def test_the_interval_covers_the_true_median_of_skewed_noise_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(tuple(generator.lognormal(0, 0.1, size=20))) or (0, 0)
        covered += low <= 1 <= high
    assert covered >= 91


def test_the_bootstrap_interval_of_a_ratio_is_that_of_the_first_over_the_second() -> None:
    assert bootstrap_ratio_interval((6.0,) * 6, (2.0,) * 8) == (3.0, 3.0)
    assert bootstrap_ratio_interval((6.0,) * 6, (2.0,) * 5) is None


def test_a_normal_interval_of_95_percent_ends_1_96_deviations_from_its_middle() -> None:
    found = of_interval((float(np.exp(0.3 - 0.196)), float(np.exp(0.3 + 0.196))))
    assert (found.mean, found.variance) == pytest.approx((0.3, 0.1**2))


def test_the_interval_of_processes_is_students() -> None:
    # Mean of the logarithms 0, deviation 0.1; t for 2 degrees of freedom 4.303: e ** 0.2484.
    low, high = between_process_interval([float(np.exp(log)) for log in (-0.1, 0.0, 0.1)]) or (0, 0)
    assert (low, high) == pytest.approx((np.exp(-0.24843), np.exp(0.24843)), rel=1e-4)
    assert between_process_interval([1.5]) is None
    assert between_process_interval([2.0, 2.0, 2.0]) == pytest.approx((2.0, 2.0))


def test_the_interval_of_processes_contains_their_median() -> None:
    speedups = [1.0] * 20 + [3.0] * 10
    low, high = between_process_interval(speedups) or (0, 0)
    assert low <= 1.0 < np.exp(np.log(speedups).mean()) < high
    low, _ = between_process_interval([1.0, 3.0] * 40 + [1.0] * 9) or (0, 0)
    assert low == 1.0  # Student's begins at 1.48


def test_the_quotient_of_two_means_has_the_degrees_of_freedom_of_welch() -> None:
    # Variances of the means 0.01 / 3 and 0.04 / 4: 0.0133333; Welch: 0.0133333 ** 2 /
    # ((1 / 300) ** 2 / 2 + 0.01 ** 2 / 3) = 4.5714; t 2.6449 (interpolated in tables 2.776, 2.571).
    first, second = LogMean(0.3, 0.01 / 3, 2), LogMean(0.1, 0.04 / 4, 3)
    quotient = first.over(second)
    assert quotient.mean == pytest.approx(0.2)
    assert quotient.degrees == pytest.approx(4.5714, rel=1e-4)
    low, high = np.log(quotient.interval(0.95))
    assert (low + high) / 2 == pytest.approx(0.2)
    assert (high - low) / 2 == pytest.approx(2.645 * 0.0133333**0.5, rel=2e-3)


def test_drift_that_lasts_widens_the_interval_of_many_processes() -> None:
    steady = np.array([0.1, -0.1, 0.0] * 8)
    drifting = np.sort(steady)
    both = [log_mean(np.exp(values).tolist()) for values in (steady, drifting)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].variance == pytest.approx(steady.var(ddof=1) / 24)
    assert both[1].variance > 3 * both[0].variance
    few = [log_mean(np.exp(values[:11]).tolist()) for values in (steady, np.sort(steady[:11]))]
    assert few[0] is not None
    assert few[1] is not None
    assert few[0].variance == pytest.approx(few[1].variance)  # too few to estimate it


@pytest.mark.parametrize(
    ("logs", "inflation"),
    [
        # Lag-1 autocorrelation 0, less its bias (0 + 1/12) / (1 - 4/12) = 0.125: the sum of
        # (1 - k/12) 0.125**k is 0.1293, and 1.2585 / (1 - 0.2585 / 11) is 1.289.
        ([0, 1, 0, -1] * 3, 1.289),
        # (6 - 5) / 12, less its bias 0.25, which is clear: (1 - 0.25**2)**0.5 / 12**0.5 more,
        # 0.5295. The sum is 0.9262, and 2.8524 / (1 - 1.8524 / 11) is 3.430.
        ([1, 1, -1, -1] * 3, 3.430),
    ],
)
def test_autocorrelation_inflates_the_variance_by_the_sum_of_bayley_and_hammersley(
    logs: list[int], inflation: float
) -> None:
    found = log_mean(np.exp(logs).tolist())
    assert found is not None
    assert found.variance == pytest.approx(np.var(logs, ddof=1) / 12 * inflation, rel=1e-3)


def test_half_a_width_is_a_share_of_the_middle() -> None:
    assert half_width((0.9, 1.1)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([0.7, 0.72, 1.04, 0.71, 1.03], [[0, 3, 1], [4, 2]]),
        ([0.7, 0.72, 1.04, 0.71, 0.69], [[4, 0, 3, 1, 2]]),  # one apart may be an accident
        ([0.70, 0.75, 0.80, 0.85, 0.90], [[0, 1, 2, 3, 4]]),  # evenly spread: no gap
        ([1.00, 1.001, 1.002, 1.05, 1.051], [[0, 1, 2, 3, 4]]),  # apart by less than a tenth
        # A gap of log(1.25 / 1.05) = 0.174, less than 20 / 5 of a spread of log 1.05 = 0.049; in
        # the other one the upper mode has that spread.
        ([1.0, 1.05, 1.25, 1.25, 1.25], [[0, 1, 2, 3, 4]]),
        ([1.0, 1.0, 1.0, 1.19, 1.25], [[0, 1, 2, 3, 4]]),
        ([0.7, 0.7, 1.1, 1.1], [[0, 1, 2, 3]]),  # four are too few
    ],
)
def test_two_modes_are_told_from_a_wide_spread(
    speedups: list[float], expected: list[list[int]]
) -> None:
    assert modes(speedups) == expected
