"""The load harness against queueing theory, run by hand; takes 3 minutes.

    python -m ensemble.bench.load.queueing_check

A strategy that sleeps a fixed time, one request at a time, is an M/D/1 queue: requests wait
load / (2 (1 - load)) of a call in the mean (Pollaczek and Khinchine). That is the mean of all
draws of arrivals; of this one the waits of an ideal server are computed as well (Lindley's
recursion). What a run differs from these is the harness, the rest is the draw.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ensemble.bench.load import loadgen
from ensemble.bench.load.batching import ALONE, Batch, Way
from ensemble.bench.load.loadgen import SERVER, Order
from ensemble.bench.load.server import Policy, Server

WITHIN = 0.05
LATEST_WAKE_S = 0.004  # the kernel ends sleeps late, by up to that; the rest is waited awake


@dataclass(frozen=True)
class Waits:
    """Mean seconds in the queue, before a call begins, and what the program adds a request."""

    load: float
    requests: int
    found_s: float
    ideal_s: float  # of these arrivals
    expected_s: float  # of all
    overhead_s: float


def expected_wait_s(load: float, call_s: float) -> float:
    """Pollaczek and Khinchine's mean wait where every call takes the same."""
    return load * call_s / (2 * (1 - load))


def ideal_wait_s(arrivals_s: Sequence[float], call_s: float) -> float:
    """The mean wait of these arrivals where every call takes the same: Lindley's recursion."""
    free_s = total_s = 0.0
    for arrival in arrivals_s:
        begin = max(arrival, free_s)
        total_s += begin - arrival
        free_s = begin + call_s
    return total_s / len(arrivals_s)


def measure(load: float, *, call_s: float, seconds: float, seed: int) -> Waits:
    """Play Poisson arrivals at a load, 0 to 1, against a strategy that sleeps.

    A call takes what it took in the mean, with what this program adds to it, which is told apart.
    """

    def compute(batch: Batch) -> tuple[int, float]:
        begin = time.perf_counter()
        time.sleep(max(0.0, call_s - LATEST_WAKE_S))
        while (passed := time.perf_counter() - begin) < call_s:
            time.sleep(0)  # lets LoadGen's thread in
        return 0, passed

    policy = Policy((Way(ALONE, 1, call_s),), lanes=1, max_batch=1, max_wait_s=0.0, capacity=10**9)
    server = Server(policy, compute=compute, answer=loadgen.answer)
    order = Order(SERVER, load / call_s, 0.99, 1.0, seconds, 1, seed)
    play = loadgen.Play(
        order,
        arrive=lambda found: server.arrive([(ident, 0, 0) for ident, _ in found]),
        finish=server.finish,
        entries=16,
        log=None,
    )
    ruling = play.run(server.serve, server.close)
    latencies, mean_s = ruling.latencies_s, server.tally.serving_s / server.tally.answered
    return Waits(
        load,
        len(latencies),
        found_s=sum(latencies) / len(latencies) - mean_s,
        ideal_s=ideal_wait_s(ruling.arrivals_s, mean_s),
        expected_s=expected_wait_s(load * mean_s / call_s, mean_s),
        overhead_s=server.tally.overhead_s or 0.0,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found at each load; 1 where the harness adds or hides more than `WITHIN`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--call_ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    bad = False
    for load in asked.loads:
        waits = measure(load, call_s=1e-3 * asked.call_ms, seconds=asked.seconds, seed=asked.seed)
        off, drawn = waits.found_s / waits.ideal_s - 1, waits.found_s / waits.expected_s - 1
        bad |= abs(off) > WITHIN
        print(
            f"load {load:.0%}, {waits.requests} requests: mean wait {1e3 * waits.found_s:.3f} ms;"
            f" an ideal server, same arrivals {1e3 * waits.ideal_s:.3f} ms ({off:+.1%});"
            f" M/D/1, all arrivals {1e3 * waits.expected_s:.3f} ms ({drawn:+.1%});"
            f" overhead {1e6 * waits.overhead_s:.0f} us a request",
            flush=True,
        )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
