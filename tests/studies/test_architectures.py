"""The page on torchvision's families says what its file holds, and judges as it says."""

import pytest

from tests.studies import architectures
from tests.studies.architectures import Case

TIMES = {
    "loop": [4.0, 8.0, 4.0],
    "lowered_vmap": [1.0, 2.0, 1.0],
    "prepacked_loop": [2.0, 4.0, 2.0],
    "best": [1.05, 2.1, 1.05],
}
CASE = Case("resnet18", 64, 3, "lowered_vmap", "picked lowered_vmap (tried: ...)", 3.0, TIMES, {})


def picking(name: str, times: list[float]) -> Case:
    return Case(*CASE.place, name, "", 3.0, {**TIMES, "best": times}, {})


def test_what_was_picked_is_no_rival_of_itself() -> None:
    assert CASE.of_the_fastest == pytest.approx(2 / 1.05)
    assert CASE.is_close
    assert not CASE.is_behind_the_loop


def test_a_pick_that_another_row_beats_by_more_than_five_percent_is_not_close() -> None:
    assert picking("prepacked_loop", [1.05, 2.1, 1.05]).is_close
    assert not picking("prepacked_loop", [1.06, 2.12, 1.06]).is_close
    assert picking("prepacked_loop", [4.1, 8.2, 4.1]).is_behind_the_loop
    assert not picking("loop", [4.1, 8.2, 4.1]).is_behind_the_loop


def test_the_page_counts_the_cases_and_names_those_that_are_further_off() -> None:
    page = architectures.page([CASE, picking("prepacked_loop", [2.0, 4.0, 2.0])])
    assert "in 1 of 2 cases, and behind the loop in 0" in page
    assert "- resnet18, 64 px, N=3: lowered_vmap is 2.00 times as fast" in page


@pytest.mark.skipif(not architectures.FILE.exists(), reason="not measured yet")
def test_the_stored_page_is_what_its_file_says() -> None:
    cases = list(architectures.read().values())
    assert architectures.PAGE.read_text() == architectures.page(cases)
    assert sum(case.is_close for case in cases) >= architectures.NEEDED * len(cases)
    assert not any(case.is_behind_the_loop for case in cases)
