"""What timed calls leave behind."""

import pytest

from ensemble.bench.timed_calls import leak, remarks

MIB = 2**20


def test_memory_that_grows_with_the_calls_is_a_leak() -> None:
    used = [100 * MIB + 20 * MIB * call for call in (3, 6, 8, 12, 14)]
    assert leak(used, [3, 6, 8, 12, 14]) == pytest.approx(20 * MIB)


def test_memory_that_settles_or_fluctuates_is_none() -> None:
    calls = [2, 4, 6, 8, 10, 12]
    settled = [100 * MIB, 150 * MIB, 160 * MIB, 160 * MIB, 160 * MIB, 160 * MIB]
    assert leak(settled, calls) is None
    assert leak([(100 + 30 * (k % 2)) * MIB for k in range(6)], calls) is None
    assert leak([(100 * MIB + 4096 * k) for k in range(6)], calls) is None  # too little
    assert leak([(100 * MIB - 20 * MIB * k) for k in range(6)], calls) is None
    assert leak([100 * MIB, 120 * MIB, 140 * MIB], [1, 2, 3]) is None  # too few rounds
    assert leak([None] * 6, calls) is None


def test_what_is_left_behind_has_figures() -> None:
    assert remarks(None, 0.1) == []
    assert remarks(20e6, 1.0) == [
        "memory grows by 20.0 MB per call",
        "keeps 1 core busy between calls",
    ]
    assert remarks(None, 1.94) == ["keeps 1.9 cores busy between calls"]
    assert remarks(None, 0.5) == ["keeps 0.5 cores busy between calls"]
