"""A run beside its baseline."""

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


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    """Log-normal samples of 20 with medians 1.1 and 1: 95 %, give or take what 200 draws show."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        new = 1.1 * np.exp(0.1 * generator.standard_normal(20))
        old = np.exp(0.1 * generator.standard_normal(20))
        low, high = ratio_interval(list(new), list(old), 0.95) or (0, 0)
        held += low <= 1.1 <= high
    assert held >= 182


def test_a_strategy_is_compared_in_times_of_the_reference_beside_it() -> None:
    """The whole machine is three times slower, the strategy by itself 1.2 times."""
    old = changed(VMAP, reference_times_s=(0.1,) * 20, times_s=(0.05,) * 20)
    new = changed(VMAP, reference_times_s=(0.3,) * 20, times_s=(0.18,) * 20)
    (found,) = compare(run(new), run(old))
    assert found.ratio == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    assert found.surely_slower(15)
    assert not found.surely_slower(25)


def test_the_reference_is_shown_in_seconds_and_never_judged() -> None:
    slow = changed(LOOP, times_s=(0.3,) * 20)
    (found,) = compare(run(slow), run(LOOP))
    assert found.ratio == pytest.approx(3.0)
    assert not found.surely_slower(10)


def test_an_unsure_difference_is_no_regression() -> None:
    noisy = changed(VMAP, times_s=(0.04, 0.08) * 10)
    (found,) = compare(run(noisy), run(VMAP))
    assert not found.surely_slower(0)


def test_rows_that_only_one_run_has_or_that_were_not_timed_are_named() -> None:
    failed = changed(VMAP, strategy="jax", times_s=(), reference_times_s=(), status="failed")
    new = run(LOOP, VMAP, failed, changed(VMAP, num_models=8))
    found = compare(new, run(LOOP, VMAP, changed(VMAP, strategy="jax")))
    assert [compared.row.case.strategy for compared in found] == ["loop", "vmap"]
    text = render(found, new, run())
    place = "batch 1, 224 px, float32"
    expected = f"not compared: jax, 4 models, {place}; vmap, 8 models, {place}"
    assert f"without times in both runs, {expected}" in text


def test_the_text_gives_ratio_interval_test_and_direction() -> None:
    slow = changed(VMAP, times_s=(0.06,) * 20)
    text = render(compare(run(slow), run(VMAP)), run(slow), run(VMAP))
    assert (
        "vmap, 4 models, batch 1, 224 px, float32: time per call / that of the loop is 1.200 of"
        " what it was (1.200 to 1.200): surely slower" in text
    )


def test_another_machine_is_refused_with_what_differs() -> None:
    other = replace(ENVIRONMENT, cores=64)
    with pytest.raises(InputError, match=r"baseline: .* in old\.json: cores 64, here 2"):
        check_machine(ENVIRONMENT, other, argument="baseline", path="old.json")
    check_machine(ENVIRONMENT, replace(ENVIRONMENT, torch="2.13"), argument="", path="")


def test_other_settings_are_said() -> None:
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


def test_rows_of_several_processes_are_compared_by_what_lies_between_these() -> None:
    old = of_processes(1.0, 1.02, 0.98)
    (same,) = compare(run(of_processes(1.01, 0.99, 1.0)), run(old))
    assert same.interval is not None
    assert same.interval[0] < 1 < same.interval[1]
    (slow,) = compare(run(of_processes(0.5, 0.51, 0.49)), run(old))
    assert slow.ratio == pytest.approx(2.0)
    assert slow.surely_slower(50)
    (one,) = compare(run(of_processes(0.5)), run(old))
    assert one.interval == pytest.approx((2.0, 2.0))


def drawn(kind: str, generator: np.random.Generator, config: Config) -> Summary:
    """A row of made-up processes, as many as the program would have taken."""
    size = config.measure.processes
    spread = {"quiet": 0.02, "one mode": 0.05, "two modes": 0.02}[kind]
    slow = generator.random(size) < (0.3 if kind == "two modes" else 0.0)
    speedups = np.exp(spread * generator.standard_normal(size) + 0.35 * slow)
    for count in range(3, size + 1):
        row = of_processes(*speedups[:count])
        if not schedule.wants_more(row, config.measure):
            break
    return row


def share_that_fails(*kinds: str, runs: int) -> float:
    """Of runs of the same code with rows of these kinds, each against another such run."""
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
        failed += any(compared.surely_slower(0) for compared in compare(new, old))
    return failed / runs


@pytest.mark.parametrize(
    "kinds",
    [
        ("quiet",),
        ("one mode",),
        ("two modes", "quiet", "one mode"),
        ("quiet", "one mode") * 6,
    ],
)
def test_the_same_code_against_itself_fails_in_at_most_5_of_100_runs(
    kinds: tuple[str, ...],
) -> None:
    """Whole runs, that end early where a row is sure, judged without any allowance."""
    assert share_that_fails(*kinds, runs=800 // len(kinds)) <= 0.05


def test_a_row_of_two_modes_is_told_and_not_judged() -> None:
    old, new = of_processes(1.0, 1.01, 0.99), of_processes(0.5, 0.51, 1.0, 0.5, 0.49)
    found = compare(run(new), run(old))
    assert not found[0].surely_slower(0)
    assert not found[0].passes(1000)
    assert "two modes, not judged" in render(found, run(new), run(old))
    (worse,) = compare(run(of_processes(0.2, 0.21, 0.4, 0.2, 0.19)), run(old))
    assert worse.surely_slower(100)  # in either mode


def test_a_row_that_claims_nothing_in_one_of_the_runs_is_judged_where_it_is_surely_slower() -> None:
    slow = changed(VMAP, times_s=(0.5,) * 20)
    busy, same = changed(slow, others_cpu_share=0.5), changed(VMAP, others_cpu_share=0.5)
    assert [compare(run(new), run(VMAP))[0].surely_slower(5) for new in (slow, busy, same)] == [
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
    assert "surely slower, although CPU busy" in text
    assert "Not judged" not in text
    (found,) = compare(run(same), run(VMAP))
    text = render([found], run(same), run(VMAP), 5)
    assert "CPU busy, not judged" in text
    assert "Not judged by --fail_above 5: vmap, 4 models, batch 1, 224 px, float32 (CPU" in text


def test_a_gate_names_what_only_one_of_the_runs_has_timed() -> None:
    new, old = run(LOOP, VMAP, changed(VMAP, num_models=8)), run(LOOP, changed(VMAP, num_models=2))
    assert comparison.not_judged(compare(new, old), new, old, 5)[2:] == []  # asked for less
    few = changed(VMAP, times_s=(0.05,) * 3, reference_times_s=(0.1,) * 3)
    asked = {replace(VMAP.case, num_models=2)}
    found = comparison.not_judged(compare(new, old), new, old, 5, asked)
    assert [text.partition(", batch")[0] for text in found] == [
        "vmap, 4 models",
        "vmap, 8 models",
        "vmap, 2 models",
    ]
    (short,) = comparison.not_judged(compare(run(few), run(VMAP)), run(few), run(VMAP), 5)
    assert short.endswith(("(too few pairs)", "(too few pairs to say)")), short
