"""A run that was played -> its record: who was answered, how soon, at what cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.bench.load.loadgen import Order, Ruling
from ensemble.bench.load.record import LoadRun
from ensemble.bench.load.server import Tally
from ensemble.statistics import queries_needed


def record(
    purpose: str, order: Order, ruling: Ruling, tally: Tally, most_waiting: int, cpu_s: float
) -> LoadRun:
    """What came of a run: percentiles are of answered requests, where these suffice."""
    missed = set(tally.missed)
    accepted = [latency for at, latency in enumerate(ruling.latencies_s) if at not in missed]
    counted = tally.answered + tally.refused + tally.failed
    problem = None
    if tally.errors:
        problem = f"{tally.errors[0]}; {tally.failed} requests failed"
    elif tally.wrong:
        problem = f"outputs disagree under load: {tally.wrong} of {tally.answered} answers"
    elif counted != len(ruling.latencies_s):
        problem = (
            f"expected {len(ruling.latencies_s)} requests to be accounted for, found {counted}"
        )
    return LoadRun(
        purpose=purpose,
        offered_qps=order.rate_qps,
        seed=order.seed,
        seconds=ruling.seconds,
        requests=len(ruling.latencies_s),
        answered=tally.answered,
        refused=tally.refused,
        failed=tally.failed,
        p50_s=tail(accepted, 0.5),
        p90_s=tail(accepted, 0.9),
        p99_s=tail(accepted, 0.99),
        tail_s=tail(accepted, order.percentile),
        longest_s=max(accepted, default=None),
        valid=ruling.valid and problem is None,
        why_not=problem or ruling.why_not,
        problem=problem,
        mean_batch=tally.answered / tally.batches if tally.batches else None,
        wasted_share=1 - tally.answered / tally.slots if tally.slots else None,
        cpu_s_per_request=cpu_s / tally.answered if tally.answered else None,
        overhead_s=tally.overhead_s,
        most_waiting=most_waiting,
        late_issue_s=ruling.late_issue_s,
    )


def tail(latencies: Sequence[float], share: float) -> float | None:
    """The percentile, or None where there are not enough requests to speak of it."""
    if len(latencies) < queries_needed(share, 0):
        return None
    return float(np.percentile(latencies, 100 * share))
