"""A part of the study of searches: found over true rate."""

from tests.studies.load_search import System, searched, study, true_rate


def test_the_search_finds_the_true_rate_of_an_m_d_1_queue() -> None:
    found = study(System(0.01, 0.04, 90.0), 150)
    assert 0.95 <= found.mean <= 1.05
    assert found.covered >= 0.88  # 50 rows
    assert found.covered_by_one >= 0.9


def test_plans_that_were_measured_too_slow_do_not_bias_it() -> None:
    system = System(0.01, 0.04, 90.0, measured_as=1.1)
    rates = [searched(system, seed)[0].qps for seed in range(60)]
    assert 0.95 <= sum(rates) / 60 / true_rate(system) <= 1.05
