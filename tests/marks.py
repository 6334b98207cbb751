"""Marks of tests' parameters."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], *, quick: int) -> list[Any]:
    """The values as parameters, all after the first `quick` of them marked slow."""
    every = list(values)
    return every[:quick] + [pytest.param(value, marks=pytest.mark.slow) for value in every[quick:]]
