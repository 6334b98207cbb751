"""Counts and durations as text, formatted the same way everywhere."""


def count(number: int, noun: str) -> str:
    """`1 model`, `2 models`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def milliseconds(seconds: float) -> str:
    """`18.1 ms`, `1,912 ms`: at least three significant digits."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"
