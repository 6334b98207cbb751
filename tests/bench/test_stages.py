"""What the progress tells of a build."""

import pytest
from numba.core import event

from ensemble.bench.stages import BUILDING, COMPILING, reported_compilation


def stages_of(strategy: str) -> list[str]:
    """What is told of a build in which numba compiles something."""
    told: list[str] = []
    with reported_compilation(strategy, lambda stage, done: told.append(stage)):
        event.start_event("numba:compile")
        event.end_event("numba:compile")
    return told


def test_functions_that_are_compiled_within_another_are_not_told_again() -> None:
    told: list[str] = []
    with reported_compilation("lowered_vmap", lambda stage, done: told.append(stage)):
        event.start_event("numba:compile")
        for _ in range(3):
            event.start_event("numba:compile")
            event.end_event("numba:compile")
        event.end_event("numba:compile")
    assert told == [COMPILING, BUILDING]


@pytest.mark.parametrize("strategy", ["lowered_vmap", "best"])
def test_kernels_that_are_compiled_are_told_as_what_they_are(strategy: str) -> None:
    assert stages_of(strategy) == [COMPILING, BUILDING]


def test_a_strategy_without_kernels_has_nothing_to_tell() -> None:
    assert stages_of("vmap") == []
