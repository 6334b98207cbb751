"""The highest rate that is held: bracketed, halved, confirmed. Pure: who plays a rate is given."""

from __future__ import annotations

from collections.abc import Callable

from ensemble.bench.config import LoadOptions
from ensemble.statistics import queries_needed

STEP = 1.2  # between rates while looking for one that is held and one that is not
CLOSE = 1.06  # how near these two must come
GIVE_UP = 0.3  # of the guess
LOWER = 0.95  # where the first confirming run does not hold; where the next does not, twice that
CONFIRM, MOST_CONFIRMS = 1, 5
LATE = 2  # requests of a run that may be late: it is as long as the percentile then needs
# Runs of a row, about: three to bracket the rate, two to halve the bracket, one or two to confirm
# it, and two for the curve below it.
RUNS = 8
EXAMPLE_QPS = 10.0


def announcement(load: LoadOptions, min_seconds: float) -> str:
    """How long a search will take, and what makes it shorter."""
    requests = queries_needed(load.latency_percentile / 100, LATE)
    minutes = RUNS * max(requests / EXAMPLE_QPS, min_seconds) / 60
    return (
        f"Searching the sustained rate takes about {RUNS} runs per row, each of at least {requests}"
        f" requests and {min_seconds:g} s: about {minutes:.0f} minutes at {EXAMPLE_QPS:g} requests"
        f" per second. Faster: --latency_percentile 90 ({queries_needed(0.9, LATE)} requests), or"
        " --target_qps (one run)"
    )


def highest(hold: Callable[[float, int], bool], guess_qps: float) -> float | None:
    """The highest rate that `hold(rate, draw)` says yes to, within `CLOSE`; None if there is none.

    `draw` numbers the arrivals: 0 while searching, so that all rates meet the same luck, and
    another for each run that confirms, so that no rate is held by its luck.
    """
    low, high = 0.0, float("inf")
    rate = guess_qps
    while not low or high == float("inf"):
        if hold(rate, 0):
            low, rate = rate, rate * STEP
        else:
            high, rate = rate, rate / STEP
        if rate < GIVE_UP * guess_qps:
            return None
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if hold(middle, 0) else (low, middle)
    for draw in range(CONFIRM, CONFIRM + MOST_CONFIRMS):
        if hold(low, draw):
            return low
        low *= LOWER**draw
    return None
