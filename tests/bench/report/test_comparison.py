"""A run against its baseline."""

from dataclasses import replace

import numpy as np
import pytest

from ensemble.bench.report import comparison, show
from ensemble.bench.report.comparison import (
    check_machine,
    compare,
    differences,
    mean_of,
    render,
)
from ensemble.bench.summary import Run, Summary
from ensemble.errors import InputError
from ensemble.strategies import STRATEGIES
from tests.made import (
    CONFIG,
    ENVIRONMENT,
    LOOP,
    UNAVAILABLE,
    VMAP,
    changed,
    row_of,
    with_options,
)


def run(*rows: Summary) -> Run:
    return Run(ENVIRONMENT, CONFIG.plain(), rows)


def test_a_strategy_is_compared_relative_to_its_paired_reference() -> None:
    """The machine is 3 times slower, the strategy relative to the reference 1.2 times."""
    old = changed(VMAP, reference_times_s=(0.1,) * 20, times_s=(0.05,) * 20)
    new = changed(VMAP, reference_times_s=(0.3,) * 20, times_s=(0.18,) * 20)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.2)


def test_a_slowdown_counts_if_it_is_significant_and_above_the_limit() -> None:
    old, new = of_processes(1.0, 1.01, 0.99, 1.0), of_processes(0.83, 0.84, 0.83, 0.82)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.205, rel=1e-3)
    low, high = found.interval or (0, 0)
    assert 1.15 < low < (found.ratio or 0) < high
    assert found.is_significantly_slower(20)
    assert not found.is_significantly_slower(21)
    (noisy,) = compare(run(of_processes(0.5, 1.2, 0.9, 0.9)), run(old))
    assert noisy.ratio is not None
    assert noisy.ratio > 1.1
    assert not noisy.is_significantly_slower(5)


def test_of_one_process_the_spread_between_processes_is_assumed() -> None:
    """10 % each: a bound of 1.645 * 0.1 * 2 ** 0.5 below the ratio, in logarithms."""
    (found,) = compare(run(of_processes(0.5)), run(of_processes(1.0)))
    assert found.ratio == pytest.approx(2.0)
    assert found.interval is not None
    assert np.log(2.0 / found.interval[0]) == pytest.approx(1.645 * 0.1 * 2**0.5, rel=1e-3)
    assert found.is_significantly_slower(5)
    (same,) = compare(run(of_processes(0.9)), run(of_processes(1.0)))
    assert not same.is_significantly_slower(5)
    assert not same.passes(5)
    assert same.inconclusive == "one process: raise --processes"


def test_the_bounds_of_several_strategies_hold_together() -> None:
    """Two strategies, and the reference, which is not gated: 0.95 ** 0.5 = 0.9747 each, 1.9545
    deviations below the ratio."""
    pairs = [
        [changed(row, strategy=name) for name in ("vmap", "jax")]
        for row in (of_processes(0.5), of_processes(1.0))
    ]
    found = compare(run(LOOP, *pairs[0]), run(LOOP, *pairs[1]))
    for one in found[1:]:
        assert one.interval is not None
        assert np.log(2.0 / one.interval[0]) == pytest.approx(1.9545 * 0.1 * 2**0.5, rel=1e-3)


def test_of_one_process_the_spread_of_its_calls_is_added_to_that_between_processes() -> None:
    noisy = changed(VMAP, times_s=(0.04, 0.08) * 10)
    low, high = noisy.speedup_interval or (0, 0)
    deviation = np.log(high / low) / 2 / 1.96
    assert deviation > 0.1
    found = mean_of(noisy, alone=False)
    assert found is not None
    assert found.variance == pytest.approx(deviation**2 + 0.1**2)


def test_the_variances_of_both_runs_add_up_in_the_bounds_of_the_gate() -> None:
    """Three processes each, whose logs deviate by 0.03: a variance of 0.0003 of either mean, 0.0006
    of their difference. Welch: 0.0006 ** 2 / (2 * 0.0003 ** 2 / 2) = 4 degrees of freedom, for
    which tables give 2.132 one-sided: 2.132 * 0.0006 ** 0.5 = 0.05222."""
    new, old = (
        of_processes(*np.exp([level - 0.03, level, level + 0.03]).tolist()) for level in (-0.2, 0.0)
    )
    (found,) = compare(run(new), run(old))
    assert found.interval is not None
    assert np.log(found.ratio or 0) == pytest.approx(0.2)
    assert 0.2 - np.log(found.interval[0]) == pytest.approx(0.05222, rel=1e-3)


def test_the_reference_is_compared_in_seconds_and_not_gated() -> None:
    slow = changed(LOOP, times_s=(0.3,) * 20)
    (found,) = compare(run(slow), run(LOOP))
    assert found.ratio == pytest.approx(3.0)
    assert found.interval is not None
    assert found.interval[0] > 1
    assert not found.is_significantly_slower(10)


def test_an_insignificant_difference_is_no_regression() -> None:
    noisy = changed(VMAP, times_s=(0.04, 0.08) * 10)
    (found,) = compare(run(noisy), run(VMAP))
    assert not found.is_significantly_slower(0)


def test_rows_that_were_not_timed_in_both_runs_are_named() -> None:
    failed = changed(VMAP, strategy="jax", times_s=(), reference_times_s=(), status="failed")
    new = run(LOOP, VMAP, failed, changed(VMAP, num_models=8))
    found = compare(new, run(LOOP, VMAP, changed(VMAP, strategy="jax")))
    assert [compared.row.case.strategy for compared in found] == ["loop", "vmap"]
    text = render(found, new, run())
    place = "batch 1, 224 px, float32"
    expected = f"jax, 4 models, {place}; vmap, 8 models, {place}"
    assert f"not compared, not timed in both runs: {expected}" in text


def test_a_line_gives_the_ratio_the_interval_and_the_direction() -> None:
    slow = changed(VMAP, times_s=(0.06,) * 20)
    text = render(compare(run(slow), run(VMAP)), run(slow), run(VMAP))
    assert (
        "vmap, 4 models, batch 1, 224 px, float32: time relative to the loop is 1.200x the"
        " baseline (0.951-1.514): inconclusive (one process: raise --processes)" in text
    )


def test_a_baseline_of_another_machine_is_rejected_with_the_difference() -> None:
    other = replace(ENVIRONMENT, cores=64)
    with pytest.raises(InputError, match=r"baseline: .* old\.json has cores 64, this machine 2"):
        check_machine(ENVIRONMENT, other, argument="baseline", path="old.json")
    check_machine(ENVIRONMENT, replace(ENVIRONMENT, torch="2.13"), argument="", path="")


def test_differing_settings_are_reported() -> None:
    old = run(VMAP)
    new = Run(
        replace(ENVIRONMENT, torch="2.15.0", git_commit="abc"),
        with_options(CONFIG, seed=1).plain(),
        (VMAP,),
    )
    assert differences(new, old) == ["torch: 2.15.0, was 2.14.1", "seed: 1, was 0"]
    assert "differs in torch: 2.15.0, was 2.14.1" in render(compare(new, old), new, old)
    assert comparison.differences(old, old) == []


def of_processes(*speedups: float) -> Summary:
    processes = (
        replace(VMAP.measurements[0], times_s=(0.1 / speedup,) * 8, reference_times_s=(0.1,) * 8)
        for speedup in speedups
    )
    return row_of(*processes)


def test_cases_that_only_the_baseline_has_are_named() -> None:
    text = render(compare(run(VMAP), run(VMAP)), run(VMAP), run(VMAP, changed(VMAP, num_models=8)))
    assert "not compared, not timed in both runs: vmap, 8 models" in text


def test_rows_of_several_processes_are_compared_by_their_between_process_spread() -> None:
    old = of_processes(1.0, 1.02, 0.98)
    (same,) = compare(run(of_processes(1.01, 0.99, 1.0)), run(old))
    assert same.interval is not None
    assert same.interval[0] < 1 < same.interval[1]
    (slow,) = compare(run(of_processes(0.5, 0.51, 0.49)), run(old))
    assert slow.ratio == pytest.approx(2.0)
    assert slow.is_significantly_slower(50)


def test_a_row_of_two_modes_is_judged_by_their_spread() -> None:
    old, new = of_processes(1.0, 1.01, 0.99, 1.0, 1.0), of_processes(0.7, 1.0, 0.7, 1.01, 1.0)
    found = compare(run(new), run(old))
    assert not found[0].is_significantly_slower(5)
    (worse,) = compare(run(of_processes(0.2, 0.21, 0.4, 0.2, 0.39)), run(old))
    assert worse.is_significantly_slower(100)  # in either mode


def test_an_inconclusive_row_fails_the_gate_only_if_it_is_significantly_slower() -> None:
    old, slow = of_processes(2.0, 2.01, 1.99), of_processes(0.2, 0.21, 0.19)
    busy, same = changed(slow, others_cpu_share=0.5), changed(old, others_cpu_share=0.5)
    assert [
        compare(run(new), run(old))[0].is_significantly_slower(5) for new in (slow, busy, same)
    ] == [True, True, False]
    assert [compare(run(new), run(old))[0].passes(5) for new in (old, slow, same)] == [
        True,
        False,
        False,
    ]
    (found,) = compare(run(slow), run(same))
    text = render([found], run(slow), run(same), 5)
    assert "significantly slower, although CPU busy" in text
    assert "Inconclusive" not in text
    (found,) = compare(run(same), run(old))
    text = render([found], run(same), run(old), 5)
    assert "inconclusive (CPU busy)" in text
    assert "Inconclusive for --fail_above 5: vmap, 4 models, batch 1, 224 px, float32 (CPU" in text


def test_a_gate_names_the_cases_that_only_one_run_has_timed() -> None:
    new, old = run(LOOP, VMAP, changed(VMAP, num_models=8)), run(LOOP, changed(VMAP, num_models=2))
    assert (
        comparison.inconclusive_cases(compare(new, old), new, old, 5)[2:] == []
    )  # fewer cases are planned
    few = changed(VMAP, times_s=(0.05,) * 3, reference_times_s=(0.1,) * 3)
    planned = {replace(VMAP.case, num_models=2)}
    found = comparison.inconclusive_cases(compare(new, old), new, old, 5, planned)
    assert [text.partition(", batch")[0] for text in found] == [
        "vmap, 4 models",
        "vmap, 8 models",
        "vmap, 2 models",
    ]
    (short,) = comparison.inconclusive_cases(compare(run(few), run(VMAP)), run(few), run(VMAP), 5)
    assert short.endswith("(too few pairs)"), short


def test_a_gate_ends_with_1_for_a_regression_3_if_inconclusive_and_0_else() -> None:
    config = with_options(CONFIG, from_json="new.json", fail_above=5.0)
    old, slow = of_processes(2.0, 2.01, 1.99), of_processes(0.2, 0.21, 0.19)
    busy, other = changed(old, others_cpu_share=0.5), {"strategy": "jax"}
    both = run(old, changed(old, **other))
    assert show.compare(config, run(old), run(old)) == 0
    assert show.compare(config, run(slow), run(old)) == 1
    assert show.compare(config, run(busy), run(old)) == 3
    assert show.compare(config, run(slow, changed(busy, **other)), both) == 1  # comes first
    assert show.compare(with_options(config, fail_above=None), run(slow), run(old)) == 0
    assert show.compare(config, run(slow), None) == 0


def test_a_strategy_that_is_unavailable_has_failed_if_it_was_asked_for_by_name() -> None:
    named = with_options(CONFIG, strategies=("loop", "cudagraph_loop"))
    assert show.has_failed(named, run(LOOP, UNAVAILABLE))
    assert not show.has_failed(with_options(named, from_json="a.json"), run(LOOP, UNAVAILABLE))
    assert not show.has_failed(with_options(CONFIG, strategies=tuple(STRATEGIES)), run(UNAVAILABLE))
    failed = changed(VMAP, status="failed", error="broke")
    assert show.has_failed(with_options(named, from_json="a.json"), run(failed))
    assert not show.has_failed(named, run(LOOP, VMAP))
