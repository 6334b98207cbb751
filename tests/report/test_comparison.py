"""A run beside its baseline."""

from dataclasses import replace

import numpy as np
import pytest

from ensemble.errors import InputError
from ensemble.records import Result, Run
from ensemble.report import comparison
from ensemble.report.comparison import (
    check_machine,
    compare,
    differences,
    ratio_interval,
    render,
)
from tests.made import CONFIG, ENVIRONMENT, LOOP, VMAP, changed


def run(*rows: Result) -> Run:
    return Run(ENVIRONMENT, CONFIG.plain(), rows)


def test_the_interval_of_two_equal_constant_samples_is_their_ratio():
    assert ratio_interval([3.0] * 10, [2.0] * 9) == (1.5, 1.5)


def test_too_few_values_have_no_interval():
    assert ratio_interval([1.0] * 5, [1.0] * 20) is None


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    """Log-normal samples of 20 with medians 1.1 and 1: 99 %, give or take what 200 draws show."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        new = 1.1 * np.exp(0.1 * generator.standard_normal(20))
        old = np.exp(0.1 * generator.standard_normal(20))
        low, high = ratio_interval(list(new), list(old)) or (0, 0)
        held += low <= 1.1 <= high
    assert held >= 182


def test_a_strategy_is_compared_in_times_of_the_reference_beside_it():
    """The whole machine is three times slower, the strategy by itself 1.2 times."""
    old = changed(VMAP, reference_times_s=(0.1,) * 20, times_s=(0.05,) * 20)
    new = changed(VMAP, reference_times_s=(0.3,) * 20, times_s=(0.18,) * 20)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    assert found.surely_slower(15)
    assert not found.surely_slower(25)


def test_the_reference_is_shown_in_seconds_and_never_judged():
    slow = changed(LOOP, times_s=(0.3,) * 20)
    (found,) = compare(run(slow), run(LOOP))
    assert found.ratio == pytest.approx(3.0)
    assert not found.surely_slower(10)


def test_an_unsure_difference_is_no_regression():
    noisy = changed(VMAP, times_s=(0.04, 0.08) * 10)
    (found,) = compare(run(noisy), run(VMAP))
    assert not found.surely_slower(0)


def test_rows_that_only_one_run_has_or_that_were_not_timed_are_named():
    failed = changed(VMAP, strategy="jax", times_s=(), reference_times_s=(), status="failed")
    new = run(LOOP, VMAP, failed, changed(VMAP, num_models=8))
    found = compare(new, run(LOOP, VMAP, changed(VMAP, strategy="jax")))
    assert [own.row.case.strategy for own in found] == ["loop", "vmap"]
    text = render(found, new, run())
    assert "without times in both runs, not compared: jax N=4, vmap N=8" in text


def test_the_text_gives_ratio_interval_test_and_direction():
    slow = changed(VMAP, times_s=(0.06,) * 20)
    text = render(compare(run(slow), run(VMAP)), run(slow), run(VMAP))
    assert (
        "vmap, 4 models, batch 1, 224 px, float32: time in times of the reference 1.200 of what it"
        " was, 95% interval 1.200 to 1.200: surely slower" in text
    )


def test_another_machine_is_refused_with_what_differs():
    other = replace(ENVIRONMENT, cores=64)
    with pytest.raises(InputError, match=r"baseline: .* in old\.json: cores 64, here 2"):
        check_machine(ENVIRONMENT, other, argument="baseline", path="old.json")
    check_machine(ENVIRONMENT, replace(ENVIRONMENT, torch="2.13"), argument="", path="")


def test_other_settings_are_said():
    old = run(VMAP)
    new = Run(
        replace(ENVIRONMENT, torch="2.15.0", git_commit="abc"),
        replace(CONFIG, seed=1).plain(),
        (VMAP,),
    )
    assert differences(new, old) == ["torch: 2.15.0, was 2.14.1", "seed: 1, was 0"]
    assert "differs in torch: 2.15.0, was 2.14.1" in render(compare(new, old), new, old)
    assert comparison.differences(old, old) == []


def of_processes(*speedups: float) -> Result:
    processes = tuple(
        replace(VMAP.processes[0], times_s=(0.1 / own,) * 8, reference_times_s=(0.1,) * 8)
        for own in speedups
    )
    return replace(VMAP, processes=processes)


def test_rows_of_several_processes_are_compared_by_what_lies_between_these():
    old = of_processes(1.0, 1.02, 0.98)
    (same,) = compare(run(of_processes(1.01, 0.99, 1.0)), run(old))
    assert same.interval is not None
    assert same.interval[0] < 1 < same.interval[1]
    (slow,) = compare(run(of_processes(0.5, 0.51, 0.49)), run(old))
    assert slow.ratio == pytest.approx(2.0)
    assert slow.surely_slower(50)
    (one,) = compare(run(of_processes(0.5)), run(old))
    assert one.interval == pytest.approx((2.0, 2.0))


def test_the_same_code_against_itself_is_called_slower_in_few_runs():
    """Three processes each, 3 % between them: at most in 5 of 100 runs."""
    generator, alarms = np.random.default_rng(2), 0
    for _ in range(400):
        new, old = (of_processes(*np.exp(0.03 * generator.standard_normal(3))) for _ in range(2))
        (found,) = compare(run(new), run(old))
        alarms += found.surely_slower(0)
    assert alarms <= 20
