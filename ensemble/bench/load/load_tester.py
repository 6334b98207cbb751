"""The load tester: runs LoadGen at given rates against one engine, and records each run."""

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
from ensemble.bench.load import loadgen
from ensemble.bench.load.batching import peak_throughput_qps
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.engine_builder import serving_mode
from ensemble.bench.load.loadgen import OFFLINE, SERVER, LoadGenSession, LoadGenSettings
from ensemble.bench.load.queue_simulation import Queueing, late_curve
from ensemble.bench.load.record import LoadRun
from ensemble.bench.load.run_record import make_record
from ensemble.bench.load.sample_library import sample_library, tenant_shares
from ensemble.bench.load.search import LATE_REQUESTS, LateCurve
from ensemble.bench.load.server import BatchingPolicy, Server
from ensemble.bench.stages import OnStage
from ensemble.machine import memory
from ensemble.statistics import queries_needed

# The queue holds what the engine can answer at peak throughput in this many latency bounds.
QUEUE_CAPACITY_BOUNDS = 2.0
# Minimum duration of a run, in latency bounds. A server with 5 % too many requests falls behind by
# one bound in 20: a shorter run would not see its queue grow.
MIN_RUN_BOUNDS = 20.0
OFFLINE_MARGIN = 1.3  # the offline query exceeds the expected throughput, to last long enough
HEARTBEAT_S = 1.0


class LoadTester:
    """Runs LoadGen against an engine, and keeps the record of each run."""

    def __init__(
        self,
        case: Case,
        load_options: LoadOptions,
        engine: Engine,
        *,
        bound_s: float,
        min_seconds: float,
        seed: int,
        on_stage: OnStage,
    ) -> None:
        self._case, self._load_options, self._engine, self._seed = case, load_options, engine, seed
        self._on_stage, self.bound_s, self._min_run_s = on_stage, bound_s, min_seconds
        self._num_tenants = serving_mode(case).num_tenants
        self._tenant_shares = tenant_shares(self._num_tenants, load_options.skew)
        self._samples = sample_library(engine.num_images, self._tenant_shares)
        self.fastest_batch_s = min(plan.seconds for plan in engine.plans)
        self.peak_qps = peak_throughput_qps(engine.plans, self._num_tenants)
        self.runs: list[LoadRun] = []

    def late_curve(self) -> LateCurve:
        """The share of late requests by rate, by a simulation with the measured times."""
        percentile = self._load_options.latency_percentile
        queueing = Queueing(
            plans=tuple(self._engine.plans),
            tenant_shares=tuple(self._tenant_shares),
            max_batch=self._load_options.max_batch,
            batching_delay_s=1e-3 * self._load_options.max_wait_ms,
            bound_s=self.bound_s,
        )
        fewest, seconds = (
            queries_needed(percentile / 100, LATE_REQUESTS),
            self._min_seconds("search"),
        )
        return late_curve(
            queueing,
            percentile=percentile,
            requests_at=lambda rate: max(fewest, ceil(seconds * rate)),
        )

    def run(
        self, purpose: str, rate_qps: float, *, trial: int = 0, percentile: float | None = None
    ) -> LoadRun:
        """Run LoadGen once; `trial` selects the arrivals of the seed."""
        scenario = self._load_options.scenario
        percentile = self._load_options.latency_percentile if percentile is None else percentile
        settings = self._settings(scenario, purpose, rate_qps, trial, percentile / 100)
        server = self._server(scenario)
        stage = f"{purpose} {rate_qps:.4g} per second" if scenario == SERVER else scenario
        session = LoadGenSession(
            settings,
            issue_query=lambda samples: server.issue(
                [(sample_id, *self._samples[index]) for sample_id, index in samples]
            ),
            flush_queries=server.flush,
            num_samples=len(self._samples),
            log_dir=self._log_dir(),
        )
        gc.collect()
        used_bytes: list[int | None] = []
        cpu, begin = time.process_time(), time.perf_counter()
        expected_s = max(settings.min_seconds, settings.min_queries / settings.rate_qps)

        def heartbeat() -> None:
            used_bytes.append(memory.used_bytes(self._engine.device))
            self._on_stage(stage, _progress(begin, expected_s))

        with _every_second(heartbeat):
            result = session.run(server.serve, server.stop)
        cpu_s = time.process_time() - cpu
        record = make_record(
            purpose, settings, result, server.counters, server.max_queue_length, cpu_s
        )
        record = replace(record, memory_growth_bytes=_growth(used_bytes))
        if scenario != SERVER:
            record = replace(record, offered_qps=None)
        self.runs.append(record)
        return record

    def _settings(
        self, scenario: str, purpose: str, rate_qps: float, trial: int, percentile: float
    ) -> LoadGenSettings:
        late = 0 if purpose == "curve" else LATE_REQUESTS
        return LoadGenSettings(
            scenario=scenario,
            rate_qps=OFFLINE_MARGIN * rate_qps if scenario == OFFLINE else rate_qps,
            percentile=percentile,
            bound_s=self.bound_s,
            min_seconds=self._min_seconds(purpose),
            min_queries=queries_needed(percentile, late),
            seed=1000 * self._seed + trial,
        )

    def _min_seconds(self, purpose: str) -> float:
        """The minimum duration of a run."""
        if self._load_options.scenario != SERVER or purpose == "curve":
            return self._min_run_s
        return max(self._min_run_s, MIN_RUN_BOUNDS * self.bound_s)

    def _server(self, scenario: str) -> Server:
        capacity = maxsize  # in the other scenarios LoadGen bounds the queue length itself
        if scenario == SERVER:
            two_full_batches = 2 * self._num_tenants * self._load_options.max_batch
            capacity = max(
                two_full_batches, ceil(QUEUE_CAPACITY_BOUNDS * self.bound_s * self.peak_qps)
            )
        policy = BatchingPolicy(
            plans=self._engine.plans,
            num_tenants=self._num_tenants,
            max_batch=self._load_options.max_batch,
            batching_delay_s=1e-3 * self._load_options.max_wait_ms,
            queue_capacity=capacity,
        )
        return Server(policy, execute=self._engine.execute, complete=loadgen.complete)

    def _log_dir(self) -> Path | None:
        if self._load_options.load_log is None:
            return None
        case = self._case
        strategy = Path(case.strategy).name.replace(":", "_")  # it may be a file of the user
        name = f"{strategy}_{case.num_models}x{case.image_size}px_{case.dtype}"
        return (
            Path(self._load_options.load_log) / name / f"seed{self._seed}_run{len(self.runs) + 1}"
        )


def _progress(begin: float, expected_s: float) -> float:
    return min(1.0, (time.perf_counter() - begin) / expected_s)


def _growth(used_bytes: Sequence[int | None]) -> int | None:
    """Memory growth after the first second, when LoadGen has drawn its arrivals."""
    _, *later = used_bytes or [None]
    if len(later) < 2 or later[0] is None or later[-1] is None:
        return None
    return later[-1] - later[0]


@contextmanager
def _every_second(heartbeat: Callable[[], None]) -> Iterator[None]:
    """Call a function now and once a second: a run may be longer than the worker timeout."""
    ended = threading.Event()

    def loop() -> None:
        heartbeat()
        while not ended.wait(HEARTBEAT_S):
            heartbeat()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
