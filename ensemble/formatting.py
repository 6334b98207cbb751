"""Counts and times as text, each written one way everywhere."""


def count(number: int, noun: str) -> str:
    """`1 model`, `2 models`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def milliseconds(seconds: float) -> str:
    """`18.1 ms`, `1,912 ms`: three digits or more."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"
