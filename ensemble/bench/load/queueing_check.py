"""Validate the load tester against queueing theory; run by hand, takes 3 minutes.

    python -m ensemble.bench.load.queueing_check

A server that sleeps a fixed time per request is an M/D/1 queue, with a mean wait of
load / (2 (1 - load)) service times (Pollaczek and Khinchine). That is the mean over all arrival
sequences; for the sequence that was drawn, Lindley's recursion gives the waits of an ideal server.
A difference from Lindley is the load tester's error, one from M/D/1 includes sampling error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.bench.load import loadgen
from ensemble.bench.load.batching import SINGLE_TENANT, Batch, BatchPlan
from ensemble.bench.load.loadgen import SERVER, LoadGenSession, LoadGenSettings
from ensemble.bench.load.server import BatchingPolicy, Server

TOLERANCE = 0.05
SLEEP_MARGIN_S = 0.004  # sleeps end late by up to this; the rest of a call is a busy wait


@dataclass(frozen=True)
class MeanWait:
    """Mean seconds in the queue, and the overhead of this program per request."""

    load: float
    requests: int
    measured_s: float
    ideal_s: float  # an ideal server, same arrivals
    theory_s: float  # M/D/1, all arrivals
    overhead_s: float


def mean_wait_s(load: float, service_s: float) -> float:
    """The mean wait of an M/D/1 queue: Pollaczek and Khinchine."""
    return load * service_s / (2 * (1 - load))


def lindley_mean_wait_s(arrivals_s: Sequence[float], service_s: float) -> float:
    """The mean wait of these arrivals at a fixed service time: Lindley's recursion."""
    free_s = total_s = 0.0
    for arrival in arrivals_s:
        begin = max(arrival, free_s)
        total_s += begin - arrival
        free_s = begin + service_s
    return total_s / len(arrivals_s)


def measure(load: float, *, service_s: float, seconds: float, seed: int) -> MeanWait:
    """Run LoadGen at a load, 0 to 1, against a server that sleeps.

    The service time is the measured mean, overhead included. The overhead is reported as well.
    """

    def execute(batch: Batch) -> tuple[int, float]:
        begin = time.perf_counter()
        time.sleep(max(0.0, service_s - SLEEP_MARGIN_S))
        while (passed := time.perf_counter() - begin) < service_s:
            time.sleep(0)  # yield to LoadGen's thread
        return 0, passed

    policy = BatchingPolicy(
        (BatchPlan(SINGLE_TENANT, 1, service_s),),
        num_tenants=1,
        max_batch=1,
        batching_delay_s=0.0,
        queue_capacity=10**9,
    )
    server = Server(policy, execute=execute, complete=loadgen.complete)
    settings = LoadGenSettings(SERVER, load / service_s, 0.99, 1.0, seconds, 1, seed)
    session = LoadGenSession(
        settings,
        issue_query=lambda samples: server.issue([(sample_id, 0, 0) for sample_id, _ in samples]),
        flush_queries=server.flush,
        num_samples=16,
        log_dir=None,
    )
    result = session.run(server.serve, server.stop)
    latencies, counters = result.latencies_s, server.counters
    mean_s = counters.batch_s / counters.answered
    return MeanWait(
        load,
        len(latencies),
        measured_s=sum(latencies) / len(latencies) - mean_s,
        ideal_s=lindley_mean_wait_s(result.arrivals_s, mean_s),
        theory_s=mean_wait_s(load * mean_s / service_s, mean_s),
        overhead_s=counters.overhead_s or 0.0,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the mean wait at each load; 1 if it is off by more than `TOLERANCE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--call_ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failed = False
    for load in args.loads:
        wait = measure(load, service_s=1e-3 * args.call_ms, seconds=args.seconds, seed=args.seed)
        error = wait.measured_s / wait.ideal_s - 1
        sampling_error = wait.measured_s / wait.theory_s - 1
        failed |= abs(error) > TOLERANCE
        print(
            f"load {load:.0%}, {wait.requests} requests: mean wait {1e3 * wait.measured_s:.3f} ms;"
            f" ideal server, same arrivals {1e3 * wait.ideal_s:.3f} ms ({error:+.1%});"
            f" M/D/1, all arrivals {1e3 * wait.theory_s:.3f} ms ({sampling_error:+.1%});"
            f" overhead {1e6 * wait.overhead_s:.0f} us per request",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
