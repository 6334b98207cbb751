"""A part of the study of intervals: the figures that the product promises, from fewer runs."""

from ensemble.bench.cli import parse
from tests.studies.intervals import (
    bimodal,
    bimodality,
    coverage,
    drifting,
    gate,
    normal,
    winner,
)

DEFAULT = parse([])


def test_intervals_cover_the_truth_whatever_the_scatter() -> None:
    for percent in (1, 3, 8):
        assert coverage(normal(percent / 100), DEFAULT, 400).covered >= 0.92


def test_an_interval_covers_the_typical_process_beside_a_rare_mode() -> None:
    for share in (0.1, 0.3):
        assert coverage(bimodal(share), DEFAULT, 400).covered >= 0.91


def test_many_processes_withstand_drift_that_lasts() -> None:
    many = parse(["--processes", "20"])
    assert coverage(drifting(0.08), many, 300).covered >= 0.8


def test_more_processes_narrow_the_interval() -> None:
    widths = [
        coverage(normal(0.07), parse(["--processes", str(count)]), 100).half_width
        for count in (3, 4, 5, 6, 10, 20)
    ]
    assert widths == sorted(widths, reverse=True)
    assert widths[4] <= 0.8 * widths[3]


def test_no_winner_is_made_of_equal_strategies() -> None:
    for number, runs in ((2, 300), (8, 60)):
        found = winner(number, normal(0.03), DEFAULT, runs)
        assert found.called_faster <= 0.05
        assert abs(found.bias) <= 0.01
        assert found.covered >= 0.93


def test_the_gate_finds_a_slowdown_and_nothing_else() -> None:
    assert gate(normal(0.03), DEFAULT, 300).fails <= 0.06
    assert gate(normal(0.08), DEFAULT, 300).fails <= 0.08
    assert gate(normal(0.03), DEFAULT, 100, slowdown=1.2).fails >= 0.95
    assert gate(normal(0.03), DEFAULT, 40, rows=20, slowdown=1.2).fails >= 0.65
    assert gate(bimodal(0.3), DEFAULT, 100, slowdown=2.0).fails >= 0.95
    one = gate(normal(0.08), parse(["--processes", "1"]), 100)
    assert one.fails <= 0.06
    assert one.inconclusive >= 0.9


def test_rows_of_one_mode_are_rarely_called_bimodal() -> None:
    assert bimodality(normal(0.08), DEFAULT, 400) <= 0.03
    assert bimodality(bimodal(0.5), parse(["--processes", "10"]), 100) >= 0.2
