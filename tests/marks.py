"""Marks of tests' parameters."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], *, quick: int) -> list[Any]:
    """The values, or tuples of them, as parameters; all after the first `quick` are marked slow."""
    every = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each) for each in every[:quick]] + [
        pytest.param(*each, marks=pytest.mark.slow) for each in every[quick:]
    ]
