"""A grid point, prepared: models, images, and the reference to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ensemble.bench.build import BuiltStrategy, build, release_compiled
from ensemble.bench.case import REFERENCE, Case
from ensemble.bench.failures import explain, optional
from ensemble.bench.measurement import Note, RankTimes
from ensemble.machine.dtypes import FLOAT32, NumericFormat
from ensemble.machine.timing import Sample
from ensemble.models.outputs import class_count, is_class_logits
from ensemble.strategies import TUNE_SECONDS, eager, find
from ensemble.strategies.agreement import check, tolerance_of
from ensemble.strategies.reduction import with_reduction

WEAK = Note("the check is weak: with these weights the logits hardly depend on the image")


class SetupError(RuntimeError):
    """The reference failed: no case of the grid point can be measured. The text is the reason."""


def _no_rank_times(built: BuiltStrategy, case: Case) -> tuple[RankTimes | None, tuple[str, ...]]:
    return None, ()


def _no_call_error(strategy: str, dtype: str) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """Where the models run: on this device, or on the ranks of torchrun."""

    build: Callable[[str, NumericFormat], BuiltStrategy]
    explain: Callable[[Exception, str, NumericFormat], str]  # why a build or a call failed
    float64_logits: Callable[[], Tensor]
    # Further timings of a built strategy, with notes.
    rank_times: Callable[[BuiltStrategy, Case], tuple[RankTimes | None, tuple[str, ...]]] = (
        _no_rank_times
    )
    # Why a call failed on another rank, whose answer is then NaN; empty if none did.
    call_error: Callable[[str, str], str] = _no_call_error
    own_processes: tuple[int, ...] = ()  # pids of the other processes of this run on this machine


@dataclass(frozen=True)
class Setup:
    """What all cases of a grid point share.

    `images` are all that there are, `(count, channels, px, px)`; `example` is made of the first of
    them. `float64_logits` are `(N, B, classes)`, None unless a case is compared to them.
    """

    backend: Backend
    models: Sequence[nn.Module]
    images: Tensor
    example: Tensor
    reference: BuiltStrategy
    float64_logits: Tensor | None
    notes: tuple[Note, ...]
    reference_alone: tuple[Sample, ...] = ()  # calls before anything else was built

    @cached_property
    def has_classes(self) -> bool:
        """Are the outputs class logits, rather than segmentation maps or embeddings?"""
        return is_class_logits(self.reference.logits, class_count(self.models[0]))


def local_setup(
    cases: Sequence[Case],
    models: Sequence[nn.Module],
    images_of: Callable[[int], Tensor],
    *,
    reduce: str = "none",
    tune_seconds: float = TUNE_SECONDS,
    is_first: bool = True,
) -> Setup:
    """The setup of these cases on the device of the models.

    Args:
        cases: cases of one grid point.
        models: float32 models, at least N of them.
        images_of: px -> `(count, channels, px, px)` float32 on the device of the models.
        reduce: see `strategies.reduction.with_reduction`.
        tune_seconds: autotuning budget of `best`.
        is_first: see `make_setup`.

    Raises:
        SetupError: the reference failed.
    """
    case = cases[0]
    chosen = models[: case.num_models]
    images = images_of(case.image_size)
    example = make_example(images, case)

    def begin(name: str, numbers: NumericFormat) -> BuiltStrategy:
        built = build(name, chosen, example, numbers, tune_seconds=tune_seconds)
        reduced = with_reduction(built.forward, reduce, classes=class_count(models[0]))
        return replace(built, timed_forward=reduced)

    backend = Backend(
        build=begin,
        explain=lambda error, name, numbers: explain(error, name, chosen, example, numbers),
        float64_logits=partial(in_float64, chosen, example),
    )
    return make_setup(cases, backend, chosen, images, is_first=is_first)


def make_setup(
    cases: Sequence[Case],
    backend: Backend,
    models: Sequence[nn.Module],
    images: Tensor,
    *,
    is_first: bool = True,
) -> Setup:
    """Build the reference, see whether its logits depend on the image, and compute them in float64
    if a case asks for that.

    The last two depend on the models and images alone: only the first process of a case does them.

    Raises:
        SetupError: the reference failed.
    """
    example = make_example(images, cases[0])
    release_compiled()
    try:
        reference = backend.build(REFERENCE, FLOAT32)
        notes: tuple[Note, ...] = (WEAK,) if is_first and _is_weak(reference) else ()
    except Exception as error:
        why = backend.explain(error, REFERENCE, FLOAT32)
        raise SetupError(f"the reference failed: {why}") from error
    float64_logits = None
    if is_first and any(map(uses_fast_algorithms, cases)):
        float64_logits, problem = optional("error to float64", backend.float64_logits)
        notes += tuple(map(Note, problem))
    return Setup(backend, models, images, example, reference, float64_logits, notes)


def make_example(images: Tensor, case: Case) -> Tensor:
    """`(B, channels, px, px)` for shared inputs, `(N, B, channels, px, px)` for per-model ones."""
    if case.inputs == "shared":
        return images[: case.batch_size]
    all_models = images[: case.num_models * case.batch_size]
    return all_models.reshape(case.num_models, case.batch_size, *images.shape[1:])


def uses_fast_algorithms(case: Case) -> bool:
    """Does the strategy multiply less than the loop (Winograd, Strassen) and round otherwise?"""
    strategy = find(case.strategy)
    return strategy is not None and strategy.uses_fast_algorithms


def in_float64(models: Sequence[nn.Module], example: Tensor) -> Tensor:
    """The logits of the models in float64."""
    return eager.logits_in(models, example, torch.float64)


def _is_weak(reference: BuiltStrategy) -> bool:
    """Does some model give a blank image the same logits as the example?"""
    blank = reference.forward(torch.zeros_like(reference.example))
    limit = 10 * tolerance_of(FLOAT32)
    of_models = zip(blank.split(1), reference.logits.split(1), strict=True)
    return not all(check(*both, tolerance=limit).problem for both in of_models)
