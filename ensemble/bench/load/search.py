"""Search the highest sustained rate: bracket it, bisect, confirm. Pure: runs are passed in."""

from __future__ import annotations

from collections.abc import Callable

from ensemble.bench.config import LoadOptions
from ensemble.statistics import queries_needed

STEP = 1.2  # between rates while bracketing
BRACKET_RATIO = 1.06  # bisect until upper / lower bound is below this
GIVE_UP_SHARE = 0.3  # of the initial rate
BACKOFF = 0.95  # after a failed confirmation, to the power of its number
FIRST_CONFIRMATION, MAX_CONFIRMATIONS = 1, 5
LATE_REQUESTS = 2  # allowed per run: a run issues as many requests as the percentile then needs
# A typical search of a row: three runs to bracket the rate, two to bisect, one or two to confirm,
# and two for the latency curve below it.
TYPICAL_RUNS = 8
EXAMPLE_QPS = 10.0


def announcement(load_options: LoadOptions, min_seconds: float) -> str:
    """How long a search will take, and what makes it shorter."""
    requests = queries_needed(load_options.latency_percentile / 100, LATE_REQUESTS)
    minutes = TYPICAL_RUNS * max(requests / EXAMPLE_QPS, min_seconds) / 60
    p90_requests = queries_needed(0.9, LATE_REQUESTS)
    return (
        f"Searching the sustained rate takes about {TYPICAL_RUNS} runs per row, each of at least"
        f" {requests} requests and {min_seconds:g} s: about {minutes:.0f} minutes at"
        f" {EXAMPLE_QPS:g} requests per second. Faster: --latency_percentile 90 ({p90_requests}"
        " requests), or --target_qps (one run)"
    )


def highest_sustained_rate(
    is_sustained: Callable[[float, int], bool], initial_qps: float
) -> float | None:
    """The highest rate that `is_sustained(rate, trial)`, within `BRACKET_RATIO`; None if none is.

    `trial` selects the arrivals: 0 during the search, so that all rates meet the same arrivals, and
    another number for each confirmation, so that no rate owes its result to one draw.
    """
    low, high = 0.0, float("inf")
    rate = initial_qps
    while not low or high == float("inf"):
        if is_sustained(rate, 0):
            low, rate = rate, rate * STEP
        else:
            high, rate = rate, rate / STEP
        if rate < GIVE_UP_SHARE * initial_qps:
            return None
    while high / low > BRACKET_RATIO:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_sustained(middle, 0) else (low, middle)
    for trial in range(FIRST_CONFIRMATION, FIRST_CONFIRMATION + MAX_CONFIRMATIONS):
        if is_sustained(low, trial):
            return low
        low *= BACKOFF**trial
    return None
