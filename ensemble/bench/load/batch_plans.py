"""A case -> its engine: each way built once, checked against the reference, and timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble.bench.build import build
from ensemble.bench.case import Case
from ensemble.bench.load.batching import (
    ALONE,
    TOGETHER,
    Way,
    sizes,
)
from ensemble.bench.load.engine import Engine, Forwards, Key
from ensemble.bench.setup import Setup
from ensemble.bench.stages import OnStage
from ensemble.machine.devices import synchronize
from ensemble.machine.timing import interleaved
from ensemble.statistics import median
from ensemble.strategies import HYBRIDS, STRATEGIES
from ensemble.strategies.agreement import TOLERANCES, check

TIMED_CALLS, TIMED_S = 5, 0.1  # of a way, at least


class DisagreementError(RuntimeError):
    """What a way computes is not what the reference computes."""


@dataclass(frozen=True)
class Plan:
    """How a case is served: a strategy for one lane, one for all lanes, or both of them."""

    lanes: int
    alone: str | None = None
    together: str | None = None


def plan(case: Case) -> Plan:
    """An ensemble is one lane, each request answered by all N models; tenants are N lanes.

    Tenants of a strategy that runs one model after another are computed alone, by a forward of each
    model; of any other strategy all together; of a hybrid by whichever way takes less time.
    """
    if case.inputs == "shared":
        return Plan(1, alone=case.strategy)
    if case.strategy in HYBRIDS:
        hybrid = HYBRIDS[case.strategy]
        return Plan(case.num_models, hybrid.few, hybrid.many)
    if STRATEGIES[case.strategy].sequential:
        return Plan(case.num_models, alone=case.strategy)
    return Plan(case.num_models, together=case.strategy)


def build_engine(case: Case, setup: Setup, *, max_batch: int, on_stage: OnStage) -> Engine:
    """Build, check and time each way of a case.

    Raises:
        DisagreementError: the logits of a way are not the reference's.
        Exception: what a strategy raises.
    """
    chosen = plan(case)
    expected = reference_logits(setup)
    images = setup.images.to(getattr(torch, case.dtype))
    modes = {ALONE: chosen.alone, TOGETHER: chosen.together}
    keys = [(mode, size) for mode, name in modes.items() if name for size in sizes(max_batch)]
    forwards, ways, largest = dict[Key, Forwards](), list[Way](), list[float]()
    for index, (mode, size) in enumerate(keys):
        on_stage(f"build {mode} {size}", index / len(keys))
        name = modes[mode]
        assert name is not None
        made, errors = _start(name, mode, size, chosen.lanes, case, setup, images, expected)
        forwards[mode, size] = made
        largest += errors
    for (mode, size), made in forwards.items():
        ways.append(Way(mode, size, _seconds(made)))
    return Engine(forwards, ways, expected, images, max(largest, default=None))


def reference_logits(setup: Setup) -> Tensor:
    """What the reference says of each image: `(N, images, classes)`."""
    shape = setup.example.shape
    inputs = (image.expand(shape).contiguous() for image in setup.images)
    return torch.cat([setup.reference.forward(x) for x in inputs], 1)


def _start(
    name: str,
    mode: str,
    size: int,
    lanes: int,
    case: Case,
    setup: Setup,
    images: Tensor,
    expected: Tensor,
) -> tuple[Forwards, list[float]]:
    """The forwards of a way, checked on the first images, with the largest error of each."""
    picked = [index % len(images) for index in range(size)]
    example = images[picked]
    ensemble = [setup.models]
    if mode == TOGETHER:
        example = example.expand(lanes, *example.shape).contiguous()
    elif lanes > 1 or case.inputs == "per_model":
        ensemble = [setup.models[lane : lane + 1] for lane in range(lanes)]
    dtype = getattr(torch, case.dtype)
    started, errors = [], list[float]()
    for lane, models in enumerate(ensemble):
        made = build(name, models, example.float(), dtype)
        reference = expected[lane : lane + 1] if len(ensemble) > 1 else expected
        found = check(made.logits, reference[: len(models), picked], tolerance=TOLERANCES[dtype])
        if found.problem:
            raise DisagreementError(f"batch {size} {mode}: {found.problem}")
        errors += [found.max_rel_error or 0.0]
        started.append(made)
    x = example.clone()
    slots = tuple(lane.unbind() for lane in (x if x.dim() == 5 else x[None]))
    return Forwards(tuple(started), x, slots), errors


def _seconds(made: Forwards) -> float:
    """What a call takes in the middle, the first lane's for all."""
    first = replace(made.started[0], example=made.input)
    rounds = interleaved(
        [first.call],
        warmup=1,
        min_rounds=TIMED_CALLS,
        min_seconds=TIMED_S,
        synchronize=lambda: synchronize(made.input.device),
    )
    seconds = median([sample.seconds for (sample,) in rounds])
    assert seconds is not None
    return seconds
