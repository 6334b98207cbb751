"""A place of the grid made ready: models, images, and the reference that rows are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.bench import roofline
from ensemble.bench.build import Started, start, tidy
from ensemble.bench.config import Config
from ensemble.bench.failures import optional, reason
from ensemble.bench.records import REFERENCE, Case, Result
from ensemble.bench.workload import Workload
from ensemble.strategies import STRATEGIES, eager
from ensemble.strategies.agreement import TOLERANCES, check
from ensemble.strategies.reduction import served

Limits = dict[str, tuple[roofline.Limits | None, tuple[str, ...]]]  # by dtype, with notes

WEAK = "the check is weak: with these weights the logits hardly depend on the image"


@dataclass(frozen=True)
class Runner:
    """Where the models of a cell run: on this device, or on the ranks of torchrun."""

    start: Callable[[str, torch.dtype], Started]
    reason: Callable[[Exception, str, torch.dtype], str]  # why a start or a call has failed
    exact: Callable[[], Tensor]  # the logits in float64
    # What else there is to measure of a row once its pairs are timed.
    finish: Callable[[Started, Result], Result] = lambda _, row: row
    beside: tuple[int, ...] = ()  # the other processes of this program on this machine


@dataclass(frozen=True)
class Cell:
    """What all rows of a cell share. `exact` holds the logits in float64, where a row asks.

    `images` is all that there are, `(count, 3, px, px)`; the example is made of the first of them.
    """

    runner: Runner
    models: Sequence[nn.Module]
    images: Tensor
    example: Tensor
    reference: Started
    exact: Tensor | None
    notes: tuple[str, ...]


def make_cell(
    cases: Sequence[Case],
    models: Sequence[nn.Module],
    images_of: Callable[[int], Tensor],
    config: Config,
    *,
    is_first: bool = True,
) -> Cell | str:
    """The cell of these cases on this device, or why its reference failed, in one line.

    Args:
        cases: rows of one cell.
        models: float32 models on the device, at least N of them.
        images_of: px -> `(count, 3, px, px)` float32 on the device.
        config: what is served of the logits, and how long `best` may take to choose.
        is_first: see `assemble`.
    """
    case = cases[0]
    chosen = models[: case.num_models]
    images = images_of(case.image_size)
    example = make_example(images, case)

    def begin(name: str, dtype: torch.dtype) -> Started:
        started = start(name, chosen, example, dtype, tune_seconds=config.tune_seconds)
        return replace(started, serve=served(started.forward, config.reduce))

    runner = Runner(
        start=begin,
        reason=lambda error, name, dtype: reason(error, name, chosen, example, dtype),
        exact=partial(in_float64, chosen, example),
    )
    return assemble(cases, runner, chosen, images, is_first=is_first)


def assemble(
    cases: Sequence[Case],
    runner: Runner,
    models: Sequence[nn.Module],
    images: Tensor,
    *,
    is_first: bool = True,
) -> Cell | str:
    """A cell: its reference started, its check judged, and its logits in float64 where
    a row of it asks for them.

    The last two are of the models and images alone: only the first process of a row asks for them.
    """
    example = make_example(images, cases[0])
    tidy()
    try:
        reference = runner.start(REFERENCE, torch.float32)
        notes: tuple[str, ...] = (WEAK,) if is_first and _is_weak(reference) else ()
    except Exception as error:
        return f"the reference failed: {runner.reason(error, REFERENCE, torch.float32)}"
    exact = None
    if is_first and any(map(saves_multiplications, cases)):
        exact, more = optional("error to float64", runner.exact)
        notes += more
    return Cell(runner, models, images, example, reference, exact, notes)


def make_example(images: Tensor, case: Case) -> Tensor:
    """`(B, 3, px, px)` for shared inputs, `(N, B, 3, px, px)` for per-model inputs."""
    if case.inputs == "shared":
        return images[: case.batch_size]
    all_models = images[: case.num_models * case.batch_size]
    return all_models.reshape(case.num_models, case.batch_size, *images.shape[1:])


def measure_limits(dtypes: Sequence[str], device: torch.device) -> Limits:
    """The device's limits in each dtype, with notes where they cannot be had."""
    return {
        dtype: optional("roofline", partial(roofline.measure, device, getattr(torch, dtype)))
        for dtype in dict.fromkeys(dtypes)
    }


def with_roofline(row: Result, limits: Limits, workload: Workload) -> Result:
    """The row with the least time that the device's limits allow, where those were measured."""
    if row.case.dtype not in limits:
        return row
    limit, notes = limits[row.case.dtype]
    if limit is None:
        return replace(row, notes=row.notes + notes)
    dtype = getattr(torch, row.case.dtype)
    example = make_example(workload.images(row.case.image_size), row.case)
    count = workload.on_one_device(row.case.num_models)
    asked = partial(roofline.work, workload.models[0], count, example, dtype)
    needed, notes = optional("roofline", asked)
    least_s, bound = needed.least_seconds(limit) if needed else (None, None)
    return replace(row, least_s=least_s, bound=bound, notes=row.notes + notes)


def saves_multiplications(case: Case) -> bool:
    """Does the strategy multiply less than the loop (Winograd, Strassen) and round otherwise?"""
    return case.strategy in STRATEGIES and STRATEGIES[case.strategy].saves_multiplications


def in_float64(models: Sequence[nn.Module], example: Tensor) -> Tensor:
    """The logits of the models in float64."""
    return eager.logits_in(models, example, torch.float64)


def _is_weak(reference: Started) -> bool:
    """Could the check not tell some model's right input from a blank one?"""
    blank = reference.forward(torch.zeros_like(reference.example))
    limit = 10 * TOLERANCES[torch.float32]
    of_models = zip(blank.split(1), reference.logits.split(1), strict=True)
    return not all(check(*both, tolerance=limit).problem for both in of_models)
