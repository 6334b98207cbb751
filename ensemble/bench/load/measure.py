"""Measure one case under load: build every batch size, then run the scenario."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ensemble.bench.build import prepare, release_compiled
from ensemble.bench.case import Case
from ensemble.bench.config import LoadOptions, MeasureOptions
from ensemble.bench.failures import explain
from ensemble.bench.load import batch_plans
from ensemble.bench.load.batch_plans import DisagreementError
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.loadgen import OFFLINE, SERVER, SINGLE_STREAM
from ensemble.bench.load.record import LoadTest
from ensemble.bench.load.runs import Player
from ensemble.bench.load.search import highest
from ensemble.bench.measurement import FAILED, OK, UNAVAILABLE, Measurement, Note
from ensemble.bench.setup import Setup
from ensemble.bench.stages import OnStage
from ensemble.errors import UnavailableError
from ensemble.formatting import milliseconds
from ensemble.machine import memory, other_processes
from ensemble.machine.devices import synchronize
from ensemble.machine.timing import interleaved
from ensemble.models import stacking
from ensemble.statistics import median

BOUND_CALLS = 4.0  # the bound, in calls of the loop, where none was asked for
CURVE = (0.4, 0.7)  # of the rate that is held: where the picture's curve is measured too
SINGLE_STREAM_PERCENTILE = 90.0  # MLPerf's

log = logging.getLogger(__name__)


class TooSlowError(RuntimeError):
    """No rate can be held: a single call takes longer than the bound."""


def measure_under_load(
    case: Case,
    setup: Setup,
    load: LoadOptions,
    options: MeasureOptions,
    *,
    seed: int,
    on_stage: OnStage,
) -> Measurement:
    """Measure a case under load. What fails becomes the error of the measurement.

    `best` chooses for each batch size. `seed` draws the arrivals.
    """
    release_compiled()
    found, dtype = Measurement(case, notes=setup.notes), getattr(torch, case.dtype)
    device, cpu = setup.example.device, other_processes.read()
    asked = batch_plans.plan(case)
    try:
        for name in filter(None, (asked.alone, asked.together)):
            prepare(name, device)
        before, peak_known = memory.used_bytes(device), memory.reset_peak(device)
        engine = batch_plans.build_engine(case, setup, max_batch=load.max_batch, on_stage=on_stage)
        found = replace(
            found, notes=found.notes + _notes(engine), max_rel_error=engine.max_rel_error
        )
        bound_s = _bound_s(case, setup, load, warmup=options.warmup)
        player = Player(
            case,
            load,
            engine,
            bound_s=bound_s,
            min_seconds=options.min_seconds,
            seed=seed,
            on_stage=on_stage,
        )
        test = _test(load, player)
    except UnavailableError as error:
        return replace(found, status=UNAVAILABLE, error=str(error))
    except (DisagreementError, TooSlowError) as error:
        return replace(found, status=FAILED, error=str(error))
    except Exception as error:
        log.debug("%s failed", case, exc_info=True)
        name = asked.alone or asked.together or case.strategy
        why = explain(error, name, setup.models, setup.example, dtype)
        return replace(found, status=FAILED, error=why)
    peak = memory.peak_bytes(device) if peak_known else None
    shared = sum(map(stacking.weight_bytes, setup.models)) if dtype == torch.float32 else 0
    problem = next((run.problem for run in test.runs if run.problem), None)
    return replace(
        found,
        status=FAILED if problem else OK,
        error=problem,
        build_s=engine.build_s,
        first_call_s=engine.first_call_s,
        peak_memory_bytes=None if peak is None or before is None else peak - before + shared,
        others_cpu_share=other_processes.share_of_others(cpu, other_processes.read()),
        load=test,
    )


def _test(load: LoadOptions, player: Player) -> LoadTest:
    """The runs that the scenario consists of."""
    percentile = load.latency_percentile
    if load.scenario == SINGLE_STREAM:
        percentile = SINGLE_STREAM_PERCENTILE
        player.play("asked", 1 / player.call_s, percentile=percentile)
    elif load.scenario == OFFLINE:
        player.play("asked", player.most_qps)
    elif load.target_qps is not None:
        player.play("asked", load.target_qps)
    else:
        _find(player)
    bound_s = player.bound_s if load.scenario == SERVER else None
    return LoadTest(load.scenario, percentile, bound_s, tuple(player.runs))


def _find(player: Player) -> None:
    """Search the rate that is held, then fill the curve below it."""
    if player.call_s > player.bound_s:
        raise TooSlowError(
            f"expected a bound of at least one call, {milliseconds(player.call_s)}, found"
            f" {milliseconds(player.bound_s)}"
        )

    def hold(rate: float, draw: int) -> bool:
        return player.play("confirm" if draw else "search", rate, draw=draw).valid

    held = highest(hold, player.guess_qps())
    if held is not None:
        for share in CURVE:
            player.play("curve", share * held)


def _bound_s(case: Case, setup: Setup, load: LoadOptions, *, warmup: int) -> float:
    """The bound that was asked for, or four times what the loop takes for one request."""
    if load.latency_bound_ms is not None:
        return 1e-3 * load.latency_bound_ms
    one = setup.example if case.inputs == "shared" else setup.example[0]
    models = setup.models if case.inputs == "shared" else setup.models[:1]

    def call() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(one) for model in models]

    rounds = interleaved(
        [call],
        warmup=warmup,
        min_rounds=10,
        min_seconds=0.5,
        synchronize=lambda: synchronize(one.device),
    )
    return BOUND_CALLS * (median([sample.seconds for (sample,) in rounds]) or 0.0)


def _notes(engine: Engine) -> tuple[Note, ...]:
    """How it was built, and the time of each batch size."""
    times = ", ".join(f"{way.mode} {way.size}: {1e3 * way.seconds:.2f} ms" for way in engine.ways)
    notes = (*engine.notes, Note("batches", times))
    if not engine.told_apart():
        notes += (Note("the check under load is weak: answers to different images hardly differ"),)
    return notes
