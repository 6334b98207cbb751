"""The study of mutants cannot rot: each edit still has its place, and its tests."""

import pytest

from tests.studies.mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_replaces_occurs_once(mutant: Mutant) -> None:
    assert mutated(mutant, ROOT) != (ROOT / mutant.file).read_text()


def test_a_mutant_out_of_date_is_an_error() -> None:
    stale = Mutant("stale", "ensemble/statistics.py", "no such text", "", ())
    with pytest.raises(ValueError, match=r"expected one 'no such text' .*, got 0: stale"):
        mutated(stale, ROOT)


def test_mutants_have_names_of_their_own_and_tests_that_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() or not name, test
