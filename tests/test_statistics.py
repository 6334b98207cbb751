"""Statistics against cited and hand-computed values."""

import numpy as np
import pytest

from ensemble.bench.cli import parse
from ensemble.statistics import (
    between_process_interval,
    bootstrap_interval,
    half_width,
    iqr,
    median,
    modes,
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


def test_the_interval_of_processes_is_students_where_that_is_the_wider() -> None:
    # Mean of the logarithms 0, deviation 0.1; t for 2 degrees of freedom 4.303: e ** 0.2484.
    low, high = between_process_interval([float(np.exp(log)) for log in (-0.1, 0.0, 0.1)]) or (0, 0)
    assert (low, high) == pytest.approx((np.exp(-0.24843), np.exp(0.24843)), rel=1e-4)
    assert between_process_interval([1.5]) is None
    assert between_process_interval([2.0, 2.0, 2.0]) == pytest.approx((2.0, 2.0))


def test_the_interval_of_processes_holds_all_of_them() -> None:
    speedups = [0.7, 0.71, 0.69, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 1.04]
    low, high = between_process_interval(speedups) or (0, 0)
    assert low <= 0.69
    assert high >= 1.04


def test_half_a_width_is_a_share_of_the_middle() -> None:
    assert half_width((0.9, 1.1)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([0.7, 0.72, 1.04, 0.71, 0.69], [[4, 0, 3, 1], [2]]),
        ([0.70, 0.75, 0.80, 0.85, 0.90], [[0, 1, 2, 3, 4]]),  # evenly spread: no gap
        ([1.00, 1.02, 1.05], [[0, 1, 2]]),  # apart by less than a tenth
        ([0.7, 1.1], [[0, 1]]),  # two are too few
    ],
)
def test_two_modes_are_told_from_a_wide_spread(
    speedups: list[float], expected: list[list[int]]
) -> None:
    assert modes(speedups) == expected


def draw(kind: str, processes: int, generator: np.random.Generator) -> np.ndarray:
    """Made-up medians of processes, as logarithms around 0: what they share, and their pairs."""
    within = generator.normal(0, 0.02, processes)  # seven pairs of 5 %
    if kind == "quiet":
        return within
    if kind == "one mode":
        return within + generator.normal(0, 0.1, processes)
    if kind == "skewed":
        return within + 0.05 * (generator.lognormal(0, 1, processes) - 1)
    rare = generator.random(processes) < float(kind.split()[0]) / 10
    return within + np.where(rare, 0.35, 0.0)


def middle(kind: str) -> float:
    """The median of what very many processes say."""
    return float(np.median(draw(kind, 400_001, np.random.default_rng(0))))


def share_covered(kind: str, *, processes: int, precision: float, runs: int = 2000) -> float:
    """In how many runs the interval holds the middle; three processes, more while it is wide."""
    generator, covered, truth = np.random.default_rng(1), 0, float(np.exp(middle(kind)))
    for _ in range(runs):
        drawn = np.exp(draw(kind, processes, generator))
        for count in range(3, processes + 1):
            low, high = between_process_interval(drawn[:count].tolist()) or (0, 0)
            if 100 * half_width((low, high)) <= precision:
                break
        covered += low <= truth <= high
    return covered / runs


@pytest.mark.parametrize("kind", ["quiet", "one mode", "skewed", "1 of 10 rare", "3 of 10 rare"])
@pytest.mark.parametrize("more", [0, 1])
def test_the_interval_covers_what_the_next_runs_say_as_often_as_it_says(
    kind: str, more: int
) -> None:
    """With the default number of processes, or one more, and precision: at least 93 % of runs."""
    options = parse([]).measure
    found = share_covered(
        kind, processes=options.processes + more, precision=options.max_ci_percent
    )
    assert found >= 0.93


def test_two_modes_that_are_met_equally_often_need_more_processes() -> None:
    """Their middle lies in neither: three alike end too early, whatever the number allowed. All
    of six or more processes, without an early end, hold it."""
    kind = "5 of 10 rare"
    assert share_covered(kind, processes=5, precision=5.0) < 0.90
    assert share_covered(kind, processes=6, precision=0.0) >= 0.93
