"""A case -> its engine: each batch plan is built, checked against the reference, and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy, at_shape, build
from ensemble.bench.case import Case
from ensemble.bench.host_copies import calls_from_host, pinned
from ensemble.bench.load.batching import ALL_TENANTS, SINGLE_TENANT, BatchPlan, batch_sizes
from ensemble.bench.load.engine import BuiltPlan, Engine, PlanKey
from ensemble.bench.setup import Setup
from ensemble.bench.stages import OnStage
from ensemble.errors import UnavailableError
from ensemble.machine.devices import synchronize
from ensemble.machine.dtypes import NumericFormat, numeric_format
from ensemble.machine.timing import interleaved
from ensemble.statistics import median
from ensemble.strategies import HYBRIDS, get
from ensemble.strategies.agreement import check, tolerance_of
from ensemble.strategies.forward import Forward
from ensemble.strategies.serving import Serving, held_bytes, weight_bytes

MIN_TIMED_CALLS, MIN_TIMED_S = 5, 0.1  # per batch plan
MAX_CACHE_SPEEDUP = 3.0  # of calls with a repeated input over calls with a new one


class DisagreementError(RuntimeError):
    """The logits of a batch plan differ from the reference."""


class CacheError(DisagreementError):
    """A batch plan answers repeated inputs from a cache."""


@dataclass(frozen=True)
class ServingMode:
    """The strategies that serve a case: of its single-tenant plans, its all-tenant plans, or both.

    An ensemble counts as one tenant, whose requests are answered by all N models.
    """

    num_tenants: int
    single_tenant: str | None = None
    all_tenants: str | None = None


def serving_mode(case: Case) -> ServingMode:
    """How a case is served.

    With per-model inputs each model is a tenant. A strategy that runs one model after another has a
    forward per tenant, any other strategy one for all tenants; a hybrid has both, and the batcher
    picks the faster one.
    """
    if case.inputs == "shared":
        return ServingMode(1, single_tenant=case.strategy)
    if case.strategy in HYBRIDS:
        hybrid = HYBRIDS[case.strategy]
        return ServingMode(case.num_models, hybrid.few, hybrid.many)
    if get(case.strategy).sequential:
        return ServingMode(case.num_models, single_tenant=case.strategy)
    return ServingMode(case.num_models, all_tenants=case.strategy)


def build_engine(case: Case, setup: Setup, *, max_batch: int, on_stage: OnStage) -> Engine:
    """Build, check and time every batch plan of a case.

    Raises:
        DisagreementError: the logits of a plan differ from the reference.
        Exception: what a strategy raises.
    """
    serving = serving_mode(case)
    expected = reference_logits(setup)
    numbers = numeric_format(case.dtype)
    images = setup.images.to(numbers.dtype)
    strategies = {SINGLE_TENANT: serving.single_tenant, ALL_TENANTS: serving.all_tenants}
    modes = {mode: strategy for mode, strategy in strategies.items() if strategy}
    sizes = batch_sizes(max_batch)
    # Built for the largest batch: it sets the peak throughput, which an autotuner then maximizes.
    order = [(mode, size) for mode in modes for size in reversed(sizes)]
    found, errors = dict[PlanKey, BuiltPlan](), list[float]()
    for index, (mode, size) in enumerate(order):
        on_stage(f"build {mode} batch {size}", index / len(order))
        found[mode, size], plan_errors = _build_plan(
            modes[mode],
            mode,
            size,
            serving.num_tenants,
            case,
            numbers,
            setup,
            images,
            expected,
            largest=found.get((mode, max_batch)),
        )
        errors += plan_errors
    built_plans = {(mode, size): found[mode, size] for mode in modes for size in sizes}
    plans = [BatchPlan(*key, _time_plan(built)) for key, built in built_plans.items()]
    servings = _servings(built_plans)
    return Engine(
        built_plans,
        plans,
        expected,
        pinned(images),
        tolerance=tolerance_of(numbers),
        max_rel_error=max(errors, default=None),
        held_bytes=held_bytes(servings),
        weight_bytes=weight_bytes(servings),
    )


def _servings(built_plans: Mapping[PlanKey, BuiltPlan]) -> list[Serving]:
    """Those of all forwards, each once."""
    forwards = {one.forward for built in built_plans.values() for one in built.forwards}
    return [forward.serving for forward in forwards if isinstance(forward, Forward)]


def reference_logits(setup: Setup) -> Tensor:
    """The logits of every image by the reference: `(N, images, classes)`.

    Raises:
        UnavailableError: the models do not give a result for each image.
    """
    shape = setup.example.shape
    inputs = (image.expand(shape).contiguous() for image in setup.images)
    outputs = [setup.reference.forward(x) for x in inputs]
    if outputs[0].dim() < 2 or outputs[0].shape[1] != 1 or outputs[0].is_complex():
        found = f"got {tuple(outputs[0].shape[1:])} of a batch of one"
        raise UnavailableError(f"load tests expect outputs (B, ...), a real one per image, {found}")
    return torch.cat(outputs, 1)


def _build_plan(
    strategy: str,
    mode: str,
    size: int,
    num_tenants: int,
    case: Case,
    numbers: NumericFormat,
    setup: Setup,
    images: Tensor,
    expected: Tensor,
    *,
    largest: BuiltPlan | None,
) -> tuple[BuiltPlan, list[float]]:
    """The forwards of a plan, checked on the first images, and the largest error of each: those of
    `largest`, prepared for this batch size, or built for it."""
    indices = [index % len(images) for index in range(size)]
    example = images[indices]
    shards = [setup.models]
    if mode == ALL_TENANTS:
        example = example.expand(num_tenants, *example.shape).contiguous()
    elif num_tenants > 1 or case.inputs == "per_model":
        shards = [setup.models[tenant : tenant + 1] for tenant in range(num_tenants)]
    forwards, errors = list[BuiltStrategy](), list[float]()
    for tenant, models in enumerate(shards):
        if largest is None:
            built = build(strategy, models, example.float(), numbers)
        else:
            built = at_shape(largest.forwards[tenant], example)
        reference = expected[tenant : tenant + 1] if len(shards) > 1 else expected
        agreement = check(
            built.logits,
            reference[: len(models), indices],
            tolerance=tolerance_of(numbers),
            has_classes=setup.has_classes,
        )
        if agreement.problem:
            raise DisagreementError(f"{mode} batch {size}: {agreement.problem}")
        errors += [agreement.max_rel_error or 0.0]
        forwards.append(built)
    x = example.clone()
    slots = tuple(batch.unbind() for batch in (x if x.dim() == 5 else x[None]))
    return BuiltPlan(tuple(forwards), x, slots), errors


def _time_plan(built: BuiltPlan) -> float:
    """The median seconds of a call with a new input, of the first tenant's forward for all; on CUDA
    with the copies from and to the host.

    Raises:
        CacheError: calls with the input before are answered much faster.
    """
    forward = replace(built.forwards[0], example=built.input)
    calls = calls_from_host(forward, built.input.float())
    rounds = interleaved(
        [calls, calls.repeat],
        ready=[built.forwards[0].ready] * 2,
        untimed=[calls.repeat, calls.repeat],
        renew=[calls.renew, _nothing],
        warmup=1,
        min_rounds=MIN_TIMED_CALLS,
        min_seconds=MIN_TIMED_S,
        synchronize=lambda: synchronize(built.input.device),
    )
    new, repeated = zip(
        *([sample.seconds for sample in samples] for samples in rounds), strict=True
    )
    speedup = min(new) / min(repeated)  # contention slows the fastest calls least
    if speedup > MAX_CACHE_SPEEDUP:
        raise CacheError(
            f"answers repeated inputs from a cache, {speedup:.0f}x faster than new ones: requests"
            " under load repeat images"
        )
    seconds = median(new)
    assert seconds is not None
    return seconds


def _nothing() -> None:
    pass
