"""A finished LoadGen run -> its record: requests by outcome, latency percentiles, cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.bench.load.loadgen import LoadGenResult, LoadGenSettings
from ensemble.bench.load.record import LoadRun
from ensemble.bench.load.server import Counters
from ensemble.statistics import queries_needed


def make_record(
    purpose: str,
    settings: LoadGenSettings,
    result: LoadGenResult,
    counters: Counters,
    max_queue_length: int,
    cpu_s: float,
) -> LoadRun:
    """The record of a run. Percentiles are of answered requests, and None if these are too few."""
    unanswered = set(counters.unanswered)
    accepted = [
        latency
        for sequence_number, latency in enumerate(result.latencies_s)
        if sequence_number not in unanswered
    ]
    issued = len(result.latencies_s)
    counted = counters.answered + counters.refused + counters.failed
    problem = None
    if counters.errors:
        problem = f"{counters.errors[0]}; {counters.failed} requests failed"
    elif counters.wrong:
        problem = f"outputs disagree under load: {counters.wrong} of {counters.answered} answers"
    elif counted != issued:
        problem = f"expected {issued} requests to be accounted for, got {counted}"
    answered, slots = counters.answered, counters.slots
    return LoadRun(
        purpose=purpose,
        offered_qps=settings.rate_qps,
        seed=settings.seed,
        seconds=result.seconds,
        requests=issued,
        answered=answered,
        refused=counters.refused,
        failed=counters.failed,
        p50_s=latency_percentile(accepted, 0.5),
        p90_s=latency_percentile(accepted, 0.9),
        p99_s=latency_percentile(accepted, 0.99),
        tail_s=latency_percentile(accepted, settings.percentile),
        longest_s=max(accepted, default=None),
        valid=result.valid and problem is None,
        why_not=problem or result.invalid_reason,
        problem=problem,
        mean_batch=answered / counters.batches if counters.batches else None,
        wasted_share=1 - answered / slots if slots else None,
        cpu_s_per_request=cpu_s / answered if answered else None,
        overhead_s=counters.overhead_s,
        most_waiting=max_queue_length,
        late_issue_s=result.max_issue_delay_s,
        late=sum(latency > settings.bound_s for latency in accepted) + issued - len(accepted),
    )


def latency_percentile(latencies: Sequence[float], share: float) -> float | None:
    """A percentile (0 to 1), or None if there are too few requests to estimate it."""
    if len(latencies) < queries_needed(share, 0):
        return None
    return float(np.percentile(latencies, 100 * share))
