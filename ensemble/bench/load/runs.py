"""Runs of the referee against one engine: an order, a server, a ruling, and a record of them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from sys import maxsize

from ensemble.bench.case import Case
from ensemble.bench.config import LoadOptions
from ensemble.bench.load import loadgen, simulation
from ensemble.bench.load.batch_plans import plan
from ensemble.bench.load.batching import most_per_second
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.figures import record
from ensemble.bench.load.loadgen import OFFLINE, SERVER, Order
from ensemble.bench.load.record import LoadRun
from ensemble.bench.load.sample_library import library, shares
from ensemble.bench.load.search import LATE
from ensemble.bench.load.server import Policy, Server
from ensemble.bench.stages import OnStage
from ensemble.machine import memory
from ensemble.statistics import queries_needed

# A request that finds more waiting than can be answered in so many bounds is refused.
QUEUE_BOUNDS = 2.0
# A server that gets a twentieth too many falls behind by one bound in so many bounds: a run that is
# to hold a rate is no shorter, or the queue that it would build up is not seen.
BOUNDS_LONG = 20.0
EARLY = 1.3  # the offline query holds more than is expected to be answered, to last long enough
HEARTBEAT_S = 1.0


class Player:
    """Plays rates against an engine, and keeps the record of each run."""

    def __init__(
        self,
        case: Case,
        load: LoadOptions,
        engine: Engine,
        *,
        bound_s: float,
        min_seconds: float,
        seed: int,
        on_stage: OnStage,
    ) -> None:
        self._case, self._load, self._engine, self._seed = case, load, engine, seed
        self._on_stage, self.bound_s, self._least_s = on_stage, bound_s, min_seconds
        self._lanes = plan(case).lanes
        self._shares = shares(self._lanes, load.skew)
        self._library = library(engine.images, self._shares)
        self.call_s = min(way.seconds for way in engine.ways)
        self.most_qps = most_per_second(engine.ways, self._lanes)
        self.runs: list[LoadRun] = []

    def guess_qps(self) -> float:
        """Where to begin the search: what the queue would hold with batches of the measured times.

        At least a twentieth of what the batches alone would allow.
        """
        guess = simulation.guess(
            self._engine.ways,
            shares=self._shares,
            percentile=self._load.latency_percentile,
            bound_s=self.bound_s,
            max_batch=self._load.max_batch,
            max_wait_s=1e-3 * self._load.max_wait_ms,
        )
        return max(guess, self.most_qps / 20)

    def play(
        self, purpose: str, rate_qps: float, *, draw: int = 0, percentile: float | None = None
    ) -> LoadRun:
        """One run; `draw` numbers the arrivals that are drawn from the seed."""
        scenario = self._load.scenario
        percentile = self._load.latency_percentile if percentile is None else percentile
        order = self._order(scenario, purpose, rate_qps, draw, percentile / 100)
        server = self._server(scenario)
        stage = f"{purpose} {rate_qps:.4g} per second" if scenario == SERVER else scenario
        play = loadgen.Play(
            order,
            arrive=lambda found: server.arrive(
                [(ident, *self._library[at]) for ident, at in found]
            ),
            finish=server.finish,
            entries=len(self._library),
            log=self._log_folder(),
        )
        gc.collect()
        held: list[int | None] = []
        cpu, begin = time.process_time(), time.perf_counter()
        expected_s = max(order.min_seconds, order.min_queries / order.rate_qps)

        def beat() -> None:
            held.append(memory.used_bytes(self._engine.device))
            self._on_stage(stage, _share(begin, expected_s))

        with _heartbeat(beat):
            ruling = play.run(server.serve, server.close)
        used_s = time.process_time() - cpu
        run = record(purpose, order, ruling, server.tally, server.most_waiting, used_s)
        run = replace(run, memory_growth_bytes=_growth(held))
        if scenario != SERVER:
            run = replace(run, offered_qps=None)
        self.runs.append(run)
        return run

    def _order(
        self, scenario: str, purpose: str, rate_qps: float, draw: int, share: float
    ) -> Order:
        return Order(
            scenario=scenario,
            rate_qps=EARLY * rate_qps if scenario == OFFLINE else rate_qps,
            percentile=share,
            bound_s=self.bound_s,
            min_seconds=self._min_seconds(purpose),
            min_queries=queries_needed(share, 0 if purpose == "curve" else LATE),
            seed=1000 * self._seed + draw,
        )

    def _min_seconds(self, purpose: str) -> float:
        """How long a run is at least."""
        if self._load.scenario != SERVER or purpose == "curve":
            return self._least_s
        return max(self._least_s, BOUNDS_LONG * self.bound_s)

    def _server(self, scenario: str) -> Server:
        capacity = maxsize  # the other scenarios decide themselves how many wait
        if scenario == SERVER:
            least = 2 * self._lanes * self._load.max_batch
            capacity = max(least, ceil(QUEUE_BOUNDS * self.bound_s * self.most_qps))
        policy = Policy(
            ways=self._engine.ways,
            lanes=self._lanes,
            max_batch=self._load.max_batch,
            max_wait_s=1e-3 * self._load.max_wait_ms,
            capacity=capacity,
        )
        return Server(policy, compute=self._engine.compute, answer=loadgen.answer)

    def _log_folder(self) -> Path | None:
        if self._load.load_log is None:
            return None
        case = self._case
        name = f"{case.strategy}_{case.num_models}x{case.image_size}px_{case.dtype}"
        folder = f"seed{self._seed}_run{len(self.runs) + 1}"
        return Path(self._load.load_log) / name / folder


def _share(begin: float, expected_s: float) -> float:
    return min(1.0, (time.perf_counter() - begin) / expected_s)


def _growth(held: Sequence[int | None]) -> int | None:
    """From what was held a second after the start, when the referee has drawn its arrivals."""
    _, *later = held or [None]
    if len(later) < 2 or later[0] is None or later[-1] is None:
        return None
    return later[-1] - later[0]


@contextmanager
def _heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """Say once a second that a run goes on: it may be longer than a silent worker may live."""
    ended = threading.Event()

    def beats() -> None:
        beat()
        while not ended.wait(HEARTBEAT_S):
            beat()

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
