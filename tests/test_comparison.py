from dataclasses import replace

import numpy as np
import pytest

from ensemble import comparison, exports
from ensemble.comparison import check_machine, compare, differences, ratio_interval, render
from ensemble.errors import InputError
from ensemble.exports import Run
from ensemble.results import Result
from tests.test_report import LOOP, VMAP
from tests.test_results import CONFIG, ENVIRONMENT


def run(*rows: Result) -> Run:
    return Run(ENVIRONMENT, exports.plain(CONFIG), rows)


def test_the_interval_of_two_equal_constant_samples_is_their_ratio():
    assert ratio_interval([3.0] * 10, [2.0] * 9) == (1.5, 1.5)


def test_too_few_values_have_no_interval():
    assert ratio_interval([1.0] * 7, [1.0] * 20) is None


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    """Log-normal samples of 20 with medians 1.1 and 1: 99 %, give or take what 200 draws show."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        new = 1.1 * np.exp(0.1 * generator.standard_normal(20))
        old = np.exp(0.1 * generator.standard_normal(20))
        low, high = ratio_interval(list(new), list(old)) or (0, 0)
        held += low <= 1.1 <= high
    assert held >= 192


def test_a_strategy_is_compared_in_times_of_the_reference_beside_it():
    """The whole machine is three times slower, the strategy by itself 1.2 times."""
    old = replace(VMAP, reference_times_s=(0.1,) * 20, times_s=(0.05,) * 20)
    new = replace(VMAP, reference_times_s=(0.3,) * 20, times_s=(0.18,) * 20)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    assert found.surely_slower(15)
    assert not found.surely_slower(25)


def test_the_reference_is_shown_in_seconds_and_never_judged():
    slow = replace(LOOP, times_s=(0.3,) * 20)
    (found,) = compare(run(slow), run(LOOP))
    assert found.ratio == pytest.approx(3.0)
    assert not found.surely_slower(10)


def test_an_unsure_difference_is_no_regression():
    noisy = replace(VMAP, times_s=(0.04, 0.08) * 10)
    (found,) = compare(run(noisy), run(VMAP))
    assert not found.surely_slower(0)


def test_rows_that_only_one_run_has_or_that_were_not_timed_are_named():
    failed = replace(VMAP, strategy="jax", times_s=(), reference_times_s=(), status="failed")
    new = run(LOOP, VMAP, failed, replace(VMAP, num_models=8))
    found = compare(new, run(LOOP, VMAP, replace(VMAP, strategy="jax")))
    assert [own.row.strategy for own in found] == ["loop", "vmap"]
    text = render(found, new, run())
    assert "without times in both runs, not compared: jax N=4, vmap N=8" in text


def test_the_text_gives_ratio_interval_test_and_direction():
    slow = replace(VMAP, times_s=(0.06,) * 20)
    text = render(compare(run(slow), run(VMAP)), run(slow), run(VMAP))
    assert (
        "vmap, 4 models, batch 1, 224 px, float32: time in times of the reference 1.200 of what it"
        " was, 99% interval 1.200 to 1.200 (bootstrap of two samples): surely slower" in text
    )


def test_another_machine_is_refused_with_what_differs():
    other = replace(ENVIRONMENT, cores=64)
    with pytest.raises(InputError, match=r"--baseline: .* in old\.json: cores 64, here 2"):
        check_machine(ENVIRONMENT, other, flag="--baseline", path="old.json")
    check_machine(ENVIRONMENT, replace(ENVIRONMENT, torch="2.13"), flag="", path="")


def test_other_settings_are_said():
    old = run(VMAP)
    new = Run(
        replace(ENVIRONMENT, torch="2.15.0", git_commit="abc"),
        exports.plain(replace(CONFIG, seed=1)),
        (VMAP,),
    )
    assert differences(new, old) == ["torch: 2.15.0, was 2.14.1", "seed: 1, was 0"]
    assert "differs in torch: 2.15.0, was 2.14.1" in render(compare(new, old), new, old)
    assert comparison.differences(old, old) == []
