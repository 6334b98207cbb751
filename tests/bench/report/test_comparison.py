"""A run against its baseline."""

from dataclasses import replace

import numpy as np
import pytest

from ensemble.bench import schedule
from ensemble.bench.cli import parse
from ensemble.bench.config import Config
from ensemble.bench.report import comparison
from ensemble.bench.report.comparison import (
    check_machine,
    compare,
    differences,
    ratio_interval,
    render,
)
from ensemble.bench.summary import Run, Summary
from ensemble.errors import InputError
from ensemble.strategies import STRATEGIES
from tests.made import (
    CONFIG,
    ENVIRONMENT,
    LOOP,
    VMAP,
    changed,
    row_of,
    with_options,
)


def run(*rows: Summary) -> Run:
    return Run(ENVIRONMENT, CONFIG.plain(), rows)


def test_the_interval_of_two_equal_constant_samples_is_their_ratio() -> None:
    assert ratio_interval([3.0] * 10, [2.0] * 9, 0.95) == (1.5, 1.5)


def test_too_few_values_have_no_interval() -> None:
    assert ratio_interval([1.0] * 5, [1.0] * 20, 0.95) is None


def test_the_interval_has_its_nominal_coverage() -> None:
    """Log-normal samples of 20 with medians 1.1 and 1: 95 %, to within the error of 200 draws."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        new = 1.1 * np.exp(0.1 * generator.standard_normal(20))
        old = np.exp(0.1 * generator.standard_normal(20))
        low, high = ratio_interval(list(new), list(old), 0.95) or (0, 0)
        covered += low <= 1.1 <= high
    assert covered >= 182


def test_a_strategy_is_compared_relative_to_its_paired_reference() -> None:
    """The machine is 3 times slower, the strategy relative to the reference 1.2 times."""
    old = changed(VMAP, reference_times_s=(0.1,) * 20, times_s=(0.05,) * 20)
    new = changed(VMAP, reference_times_s=(0.3,) * 20, times_s=(0.18,) * 20)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    assert found.is_significantly_slower(15)
    assert not found.is_significantly_slower(25)


def test_the_reference_is_compared_in_seconds_and_not_gated() -> None:
    slow = changed(LOOP, times_s=(0.3,) * 20)
    (found,) = compare(run(slow), run(LOOP))
    assert found.ratio == pytest.approx(3.0)
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
        " baseline (1.200-1.200): significantly slower" in text
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


def test_rows_of_several_processes_are_compared_by_their_between_process_spread() -> None:
    old = of_processes(1.0, 1.02, 0.98)
    (same,) = compare(run(of_processes(1.01, 0.99, 1.0)), run(old))
    assert same.interval is not None
    assert same.interval[0] < 1 < same.interval[1]
    (slow,) = compare(run(of_processes(0.5, 0.51, 0.49)), run(old))
    assert slow.ratio == pytest.approx(2.0)
    assert slow.is_significantly_slower(50)
    (one,) = compare(run(of_processes(0.5)), run(old))
    assert one.interval == pytest.approx((2.0, 2.0))


def drawn(kind: str, generator: np.random.Generator, config: Config) -> Summary:
    """A row of synthetic processes, as many as the program would have run."""
    size = config.measure.processes
    spread = {"quiet": 0.02, "unimodal": 0.05, "bimodal": 0.02}[kind]
    slow = generator.random(size) < (0.3 if kind == "bimodal" else 0.0)
    speedups = np.exp(spread * generator.standard_normal(size) + 0.35 * slow)
    for count in range(3, size + 1):
        row = of_processes(*speedups[:count])
        if not schedule.wants_more(row, config.measure):
            break
    return row


def false_alarm_rate(*kinds: str, runs: int) -> float:
    """The share of gates that fail between two runs of the same code, with rows of these kinds."""
    generator, config, failed = np.random.default_rng(2), parse([]), 0
    strategies = [name for name in STRATEGIES if name != "loop"]
    for _ in range(runs):
        new, old = (
            run(
                *(
                    changed(drawn(kind, generator, config), strategy=name)
                    for name, kind in zip(strategies, kinds, strict=False)
                )
            )
            for _ in range(2)
        )
        failed += any(compared.is_significantly_slower(0) for compared in compare(new, old))
    return failed / runs


@pytest.mark.parametrize(
    "kinds",
    [
        ("quiet",),
        ("unimodal",),
        ("bimodal", "quiet", "unimodal"),
        ("quiet", "unimodal") * 6,
    ],
)
def test_the_same_code_against_itself_fails_in_at_most_5_of_100_runs(
    kinds: tuple[str, ...],
) -> None:
    """Whole runs, which stop early where a row has converged, gated at 0 %."""
    assert false_alarm_rate(*kinds, runs=800 // len(kinds)) <= 0.05


def test_a_bimodal_row_is_inconclusive() -> None:
    old, new = of_processes(1.0, 1.01, 0.99), of_processes(0.5, 0.51, 1.0, 0.5, 0.49)
    found = compare(run(new), run(old))
    assert not found[0].is_significantly_slower(0)
    assert not found[0].passes(1000)
    assert "inconclusive (bimodal)" in render(found, run(new), run(old))
    (worse,) = compare(run(of_processes(0.2, 0.21, 0.4, 0.2, 0.19)), run(old))
    assert worse.is_significantly_slower(100)  # in either mode


def test_an_inconclusive_row_fails_the_gate_only_if_it_is_significantly_slower() -> None:
    slow = changed(VMAP, times_s=(0.5,) * 20)
    busy, same = changed(slow, others_cpu_share=0.5), changed(VMAP, others_cpu_share=0.5)
    assert [
        compare(run(new), run(VMAP))[0].is_significantly_slower(5) for new in (slow, busy, same)
    ] == [
        True,
        True,
        False,
    ]
    assert [compare(run(new), run(VMAP))[0].passes(5) for new in (VMAP, slow, same)] == [
        True,
        False,
        False,
    ]
    (found,) = compare(run(slow), run(same))
    text = render([found], run(slow), run(same), 5)
    assert "significantly slower, although CPU busy" in text
    assert "Inconclusive" not in text
    (found,) = compare(run(same), run(VMAP))
    text = render([found], run(same), run(VMAP), 5)
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
