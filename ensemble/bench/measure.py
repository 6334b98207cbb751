"""One row: build -> check -> time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ensemble.bench.build import Started, tidy
from ensemble.bench.config import Config
from ensemble.bench.records import (
    REFERENCE,
    Case,
    Process,
    Result,
)
from ensemble.bench.setup import Cell
from ensemble.bench.stages import (
    BUILDING,
    TIMING,
    Stage,
    telling,
)
from ensemble.errors import UnavailableError
from ensemble.machine import other_processes
from ensemble.machine.devices import synchronize
from ensemble.machine.timing import Sample, interleaved
from ensemble.statistics import median
from ensemble.strategies.agreement import TOLERANCES, check, check_served

# Cores that a forward on an accelerator keeps busy: what launches its kernels, and the driver.
LAUNCHING = 2

log = logging.getLogger(__name__)


def measure(
    case: Case, cell: Cell, config: Config, *, progress: Stage, picked: str | None = None
) -> Result:
    """The row of a case, measured in this process; a failure is a row with its reason.

    picked: what an earlier process has chosen for this row, where it did.
    """
    tidy()
    dtype = getattr(torch, case.dtype)
    strategy = picked or (REFERENCE if case.is_self_check else case.strategy)
    row = Result(case, notes=cell.notes, picked=picked)
    try:
        progress(BUILDING, 0.0)
        started = cell.reference
        if not case.is_reference:
            with telling(strategy, progress):
                started = cell.runner.start(strategy, dtype)
        row = _checked(row, started, cell, config)
        if row.error:
            return row
        process = _time(case, started, cell, config, progress)
        timed = cell.runner.finish(started, replace(row, processes=(process,)))
        # Later calls may differ from the first: memory that was freed is only now overwritten.
        problem = _problem_served(started, cell, config)
        if problem:
            return _failed(row, f"after its timed calls, {problem}")
        return timed
    except UnavailableError as error:
        return replace(row, status="unavailable", error=str(error))
    except Exception as error:
        log.debug("%s failed", case, exc_info=True)
        return _failed(row, cell.runner.reason(error, strategy, dtype))


def reference_row(row: Result, cell: Cell) -> Result | None:
    """The row of the reference beside which `row` was timed; None where it has no pairs."""
    if row.case.is_reference or row.status != "ok" or not row.reference_times_s:
        return None
    (process,) = row.processes
    logits = cell.reference.logits
    return Result(
        replace(row.case, strategy=REFERENCE, dtype="float32"),
        processes=(
            replace(
                _untimed(cell.reference),
                times_s=process.reference_times_s,
                page_faults_per_call=process.reference_page_faults_per_call,
                others_cpu_share=process.others_cpu_share,
            ),
        ),
        max_rel_error=0.0,
        error_float64=None,
        top1=logits.argmax(-1).tolist(),
        top1_agreement=1.0,
        notes=cell.notes,
    )


def _failed(row: Result, error: str) -> Result:
    return replace(row, status="failed", error=error)


def _checked(row: Result, started: Started, cell: Cell, config: Config) -> Result:
    """The row with how its logits compare with the reference's, failed where they do not agree."""
    limit = TOLERANCES[started.example.dtype]
    found = check(started.logits, cell.reference.logits, tolerance=limit)
    exact = None if cell.exact is None else check(started.logits, cell.exact, tolerance=limit)
    row = replace(
        row,
        processes=(_untimed(started),),
        notes=row.notes + started.notes,
        max_rel_error=found.max_rel_error,
        error_float64=exact.max_rel_error if exact else None,
        top1=found.top1,
        top1_agreement=found.top1_agreement,
        picked=started.choice.name if started.choice else row.picked,
    )
    problem = found.problem
    if not problem and config.reduce != "none":
        problem = _problem_served(started, cell, config)
    return _failed(row, problem) if problem else row


def _problem_served(started: Started, cell: Cell, config: Config) -> str | None:
    """What is wrong with what a call serves: logits, or the mean of their probabilities."""
    return check_served(
        started.call(),
        cell.reference.logits,
        reduce=config.reduce,
        tolerance=TOLERANCES[started.example.dtype],
    ).problem


def _untimed(started: Started) -> Process:
    return Process(
        times_s=(),
        reference_times_s=(),
        build_s=started.build_s,
        first_call_s=started.first_call_s,
        peak_memory_bytes=started.peak_memory_bytes,
        tune_s=started.choice.seconds if started.choice else None,
    )


def _time(case: Case, started: Started, cell: Cell, config: Config, progress: Stage) -> Process:
    """Time the strategy in pairs with the reference; the reference row by itself."""
    reference, beside = cell.reference, cell.runner.beside
    both = [reference] if case.is_reference else [reference, started]
    rounds, begin, before = [], time.perf_counter(), other_processes.read(beside)
    for samples in interleaved(
        [partial(one.serve, one.example) for one in both],
        ready=[one.ready for one in both],
        warmup=config.warmup,
        min_rounds=config.min_pairs,
        min_seconds=config.min_seconds,
        synchronize=lambda: synchronize(reference.example.device),
    ):
        rounds.append(samples)
        waited = (time.perf_counter() - begin) / config.min_seconds if config.min_seconds else 1.0
        progress(TIMING, min(1.0, waited, len(rounds) / config.min_pairs))
    after, is_cpu = other_processes.read(beside), reference.example.device.type == "cpu"
    ours = [samples[-1] for samples in rounds]
    paired = [] if case.is_reference else [samples[0] for samples in rounds]
    return replace(
        _untimed(started),
        times_s=tuple(sample.seconds for sample in ours),
        reference_times_s=tuple(sample.seconds for sample in paired),
        page_faults_per_call=_page_faults(ours),
        reference_page_faults_per_call=_page_faults(paired),
        others_cpu_share=other_processes.share_of_others(
            before, after, needed=None if is_cpu else LAUNCHING
        ),
    )


def _page_faults(samples: Sequence[Sample]) -> float | None:
    return median([sample.page_faults for sample in samples if sample.page_faults is not None])
