"""One row under load: build every batch size -> play what the scenario asks -> figures."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ensemble.bench.build import prepare, tidy
from ensemble.bench.config import Config
from ensemble.bench.failures import reason
from ensemble.bench.load import batch_plans
from ensemble.bench.load.batch_plans import DisagreementError
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.loadgen import OFFLINE, SERVER, SINGLE_STREAM
from ensemble.bench.load.runs import Player
from ensemble.bench.load.search import highest
from ensemble.bench.records import (
    Case,
    Load,
    Process,
    Result,
)
from ensemble.bench.setup import Cell
from ensemble.bench.stages import Stage
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


def measure(
    case: Case, cell: Cell, config: Config, *, progress: Stage, picked: str | None = None
) -> Result:
    """The row of a case under load; a failure is a row with its reason.

    `picked` is not asked: `best` chooses anew for each batch size.
    """
    tidy()
    row, dtype = Result(case, notes=cell.notes), getattr(torch, case.dtype)
    device, cpu = cell.example.device, other_processes.read()
    asked = batch_plans.plan(case)
    try:
        for name in filter(None, (asked.alone, asked.together)):
            prepare(name, device)
        before, peak_known = memory.used_bytes(device), memory.reset_peak(device)
        engine = batch_plans.build(case, cell, max_batch=config.max_batch, progress=progress)
        row = replace(row, notes=row.notes + _notes(engine), max_rel_error=engine.max_rel_error)
        player = Player(case, config, engine, _bound_s(case, cell, config), progress)
        load = _load(config, player)
    except UnavailableError as error:
        return replace(row, status="unavailable", error=str(error))
    except (DisagreementError, TooSlowError) as error:
        return replace(row, status="failed", error=str(error))
    except Exception as error:
        log.debug("%s failed", case, exc_info=True)
        name = asked.alone or asked.together or case.strategy
        why = reason(error, name, cell.models, cell.example, dtype)
        return replace(row, status="failed", error=why)
    peak = memory.peak_bytes(device) if peak_known else None
    shared = sum(map(stacking.weight_bytes, cell.models)) if dtype == torch.float32 else 0
    process = Process(
        times_s=(),
        reference_times_s=(),
        build_s=engine.build_s,
        first_call_s=engine.first_call_s,
        peak_memory_bytes=None if peak is None or before is None else peak - before + shared,
        others_cpu_share=other_processes.share_of_others(cpu, other_processes.read()),
        load=load,
    )
    problem = next((run.problem for run in load.runs if run.problem), None)
    row = replace(row, processes=(process,))
    return replace(row, status="failed", error=problem) if problem else row


def _load(config: Config, player: Player) -> Load:
    """Play what the scenario asks."""
    if config.scenario == SINGLE_STREAM:
        player.play("asked", 1 / player.call_s, percentile=SINGLE_STREAM_PERCENTILE)
    elif config.scenario == OFFLINE:
        player.play("asked", player.most_qps)
    elif config.target_qps is not None:
        player.play("asked", config.target_qps)
    else:
        _find(player)
    percentile = config.latency_percentile
    if config.scenario == SINGLE_STREAM:
        percentile = SINGLE_STREAM_PERCENTILE
    assert config.scenario is not None
    bound_s = player.bound_s if config.scenario == SERVER else None
    return Load(config.scenario, percentile, bound_s, tuple(player.runs))


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


def _bound_s(case: Case, cell: Cell, config: Config) -> float:
    """The bound that was asked for, or four times what the loop takes for one request."""
    if config.latency_bound_ms is not None:
        return 1e-3 * config.latency_bound_ms
    one = cell.example if case.inputs == "shared" else cell.example[0]
    models = cell.models if case.inputs == "shared" else cell.models[:1]

    def call() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(one) for model in models]

    rounds = interleaved(
        [call],
        warmup=config.warmup,
        min_rounds=10,
        min_seconds=0.5,
        synchronize=lambda: synchronize(one.device),
    )
    return BOUND_CALLS * (median([sample.seconds for (sample,) in rounds]) or 0.0)


def _notes(engine: Engine) -> tuple[str, ...]:
    """How it was built, and what each batch size takes alone or together."""
    times = ", ".join(f"{way.mode} {way.size}: {1e3 * way.seconds:.2f} ms" for way in engine.ways)
    notes = (*engine.notes, f"batches ({times})")
    if not engine.told_apart():
        notes += ("the check under load is weak: answers to different images hardly differ",)
    return notes
