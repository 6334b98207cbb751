"""Measure one case under load: build its batch plans, then run the scenario."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from ensemble.bench.build import prepare, release_compiled
from ensemble.bench.case import Case
from ensemble.bench.config import LoadOptions, MeasureOptions
from ensemble.bench.failures import explain
from ensemble.bench.host_copies import pinned
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.engine_builder import DisagreementError, build_engine, serving_mode
from ensemble.bench.load.load_tester import LoadTester
from ensemble.bench.load.loadgen import OFFLINE, SERVER, SINGLE_STREAM
from ensemble.bench.load.record import LoadTest, RateEstimate
from ensemble.bench.load.search import Outcome, search_rate
from ensemble.bench.measurement import FAILED, OK, UNAVAILABLE, Measurement, Note
from ensemble.bench.setup import Setup
from ensemble.bench.stages import OnStage
from ensemble.errors import UnavailableError
from ensemble.formatting import milliseconds
from ensemble.machine import gpu_state, memory, other_processes
from ensemble.machine.devices import synchronize
from ensemble.machine.dtypes import numeric_format
from ensemble.machine.precision import Float32Precision, switch_float32_precision
from ensemble.machine.timing import interleaved
from ensemble.models import stacking
from ensemble.statistics import median

DEFAULT_BOUND_CALLS = 4.0  # the default latency bound, in calls of the loop
CURVE_SHARES = (0.4, 0.7)  # of the sustained rate: further points of the latency curve
SINGLE_STREAM_PERCENTILE = 90.0  # MLPerf's

log = logging.getLogger(__name__)


class TooSlowError(RuntimeError):
    """No rate can be sustained: a single call takes longer than the latency bound."""


def measure_under_load(
    case: Case,
    setup: Setup,
    load_options: LoadOptions,
    options: MeasureOptions,
    *,
    seed: int,
    on_stage: OnStage,
) -> Measurement:
    """Measure a case under load. A failure becomes the error of the measurement.

    `best` chooses a strategy at the largest batch size. `seed` draws the arrivals.
    """
    release_compiled()
    measurement, numbers = Measurement(case, notes=setup.notes), numeric_format(case.dtype)
    device, cpu = setup.example.device, other_processes.read()
    serving = serving_mode(case)
    try:
        for strategy in filter(None, (serving.single_tenant, serving.all_tenants)):
            prepare(strategy, device)
        before, peak_known = memory.used_bytes(device), memory.reset_peak(device)
        reserved_before = memory.reserved_bytes(device)
        engine = build_engine(case, setup, max_batch=load_options.max_batch, on_stage=on_stage)
        measurement = replace(
            measurement,
            notes=measurement.notes + _notes(engine),
            max_rel_error=engine.max_rel_error,
        )
        tester = LoadTester(
            case,
            load_options,
            engine,
            bound_s=_bound_s(case, setup, load_options, warmup=options.warmup),
            min_seconds=options.min_seconds,
            seed=seed,
            on_stage=on_stage,
        )
        reader = gpu_state.open_reader(device)
        load_test = _run_scenario(load_options, tester)
        gpu = reader.read() if reader else None
    except UnavailableError as error:
        return replace(measurement, status=UNAVAILABLE, error=str(error))
    except (DisagreementError, TooSlowError) as error:
        return replace(measurement, status=FAILED, error=str(error))
    except Exception as error:
        log.debug("%s failed", case, exc_info=True)
        strategy = serving.single_tenant or serving.all_tenants or case.strategy
        reason = explain(error, strategy, setup.models, setup.example, numbers)
        return replace(measurement, status=FAILED, error=reason)
    finally:  # as `devices.configure` has set it
        switch_float32_precision(Float32Precision.IEEE, device)
    peak = memory.peak_bytes(device) if peak_known else None
    peak_reserved = memory.peak_reserved_bytes(device)
    shared = sum(map(stacking.weight_bytes, setup.models)) if numbers.dtype == torch.float32 else 0
    weights = engine.weight_bytes
    problem = next((run.problem for run in load_test.runs if run.problem), None)
    return replace(
        measurement,
        status=FAILED if problem else OK,
        error=problem,
        build_s=engine.build_s,
        first_call_s=engine.first_call_s,
        peak_memory_bytes=memory.increase(before, peak, shared),
        peak_reserved_bytes=memory.increase(reserved_before, peak_reserved, shared),
        held_bytes=engine.held_bytes,
        bytes_per_model=weights // case.num_models if weights is not None else None,
        others_cpu_share=other_processes.share_of_others(cpu, other_processes.read()),
        load=load_test,
        gpu=gpu,
    )


def _run_scenario(load_options: LoadOptions, tester: LoadTester) -> LoadTest:
    """All runs of the scenario."""
    percentile, estimate = load_options.latency_percentile, None
    if load_options.scenario == SINGLE_STREAM:
        percentile = SINGLE_STREAM_PERCENTILE
        tester.run("asked", 1 / tester.fastest_batch_s, percentile=percentile)
    elif load_options.scenario == OFFLINE:
        tester.run("asked", tester.peak_qps)
    elif load_options.target_qps is not None:
        tester.run("asked", load_options.target_qps)
    else:
        estimate = _search_rate(tester)
    bound_s = tester.bound_s if load_options.scenario == SERVER else None
    return LoadTest(load_options.scenario, percentile, bound_s, tuple(tester.runs), estimate)


def _search_rate(tester: LoadTester) -> RateEstimate | None:
    """Search the sustained rate, then add points to the latency curve below it."""
    if tester.fastest_batch_s > tester.bound_s:
        raise TooSlowError(
            f"the latency bound ({milliseconds(tester.bound_s)}) is shorter than one call"
            f" ({milliseconds(tester.fastest_batch_s)})"
        )

    def run(rate: float, trial: int) -> Outcome:
        found = tester.run("search", rate, trial=trial)
        if found.problem:
            raise DisagreementError(found.problem)
        return Outcome(rate, found.requests, found.late or 0)

    estimate = search_rate(run, tester.late_curve())
    if estimate is not None:
        for share in CURVE_SHARES:
            tester.run("curve", share * estimate.qps)
    return estimate


def _bound_s(case: Case, setup: Setup, load_options: LoadOptions, *, warmup: int) -> float:
    """The requested latency bound, or four times one request by the loop."""
    if load_options.latency_bound_ms is not None:
        return 1e-3 * load_options.latency_bound_ms
    one = pinned(setup.example if case.inputs == "shared" else setup.example[0])
    device = setup.example.device
    models = setup.models if case.inputs == "shared" else setup.models[:1]

    def call() -> list[torch.Tensor]:
        with torch.inference_mode():
            x = one.to(device, non_blocking=True)
            return [logits.cpu() for logits in [model(x) for model in models]]

    rounds = interleaved(
        [call],
        ready=[partial(switch_float32_precision, Float32Precision.IEEE, device)],
        warmup=warmup,
        min_rounds=10,
        min_seconds=0.5,
        synchronize=lambda: synchronize(device),
    )
    return DEFAULT_BOUND_CALLS * (median([sample.seconds for (sample,) in rounds]) or 0.0)


def _notes(engine: Engine) -> tuple[Note, ...]:
    """Notes of the strategies, the time of each batch plan, and a weak check."""
    times = ", ".join(
        f"{plan.mode} batch {plan.batch_size}: {1e3 * plan.seconds:.2f} ms" for plan in engine.plans
    )
    notes = (*engine.notes, Note("batch plans", times))
    if not engine.distinguishes_images():
        notes += (Note("weak check under load: answers to different images hardly differ"),)
    return notes
