"""The schedule of `lowered_vmap` on more cores than are here, from measured times of its steps."""

import pytest

from ensemble.compiler.runtime.work_stealing import team_size
from tests.studies import schedule
from tests.studies.schedule import Measured

NETS = schedule.read()
EVEN = Measured("made up", 224, 0, {size: 1.0 / size for size in range(1, 65)})  # shared for free


def test_whole_rounds_are_dealt_and_what_is_left_is_shared_in_rounds_of_teams() -> None:
    assert schedule.simulate(EVEN, 6, 2, lambda left, cores: cores) == 3.0
    assert schedule.simulate(EVEN, 5, 2, lambda left, cores: 2) == 2.5
    assert schedule.simulate(EVEN, 4, 6, lambda left, cores: 2) == 1.0  # three teams: two rounds
    assert schedule.least(EVEN, 4, 6) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("left", "cores", "size"), [(1, 2, 2), (4, 6, 3), (6, 8, 1), (16, 24, 3), (1, 64, 8), (4, 8, 2)]
)
def test_a_team_is_of_the_size_by_which_the_models_left_take_the_least_time(
    left: int, cores: int, size: int
) -> None:
    assert team_size(left, cores) == size


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"{net.arch}, {net.px} px")
def test_up_to_64_cores_no_other_dealing_of_models_to_equal_teams_is_much_faster(
    net: Measured,
) -> None:
    ratios = {
        (count, cores): schedule.simulate(net, count, cores, team_size.py_func)
        / schedule.least(net, count, cores)
        for count in (1, 4, 6, 16)
        for cores in range(1, 65)
    }
    assert max(ratios.values()) < 1.3, max(ratios, key=ratios.__getitem__)
    assert sum(ratios.values()) / len(ratios) < 1.05
