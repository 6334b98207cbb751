"""The loop over N and strategies: build -> check -> time, one `Result` at a time."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ensemble import load, memory, roofline, stacking, strategies
from ensemble.checking import TOLERANCES, check
from ensemble.errors import UnavailableError
from ensemble.results import REFERENCE, SELF_CHECK, Config, Result, median
from ensemble.strategies import BEST, STRATEGIES, best
from ensemble.sweep import cells
from ensemble.timing import interleaved, synchronize

if TYPE_CHECKING:
    from ensemble.strategies import Forward

# Called with the row's name, what is being done to it, and how much of the row is done (0 to 1).
Progress = Callable[[str, str, float], None]

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """A strategy after its build and first calls."""

    forward: Forward
    example: Tensor
    logits: Tensor
    build_s: float
    first_call_s: float
    peak_memory_bytes: int | None
    notes: tuple[str, ...]


def plan(config: Config, models: Sequence[nn.Module], device: torch.device) -> list[Result]:
    """The rows to measure, still empty, in their order: cell by cell of the grid.

    `best` stands for the reference and the strategy that is picked.
    """
    return [
        Result(name, num_models, batch_size, image_size, dtype, config.inputs)
        for image_size, batch_size, num_models in product(
            config.image_size, config.batch_size, config.num_models
        )
        for name, dtype in _names(config, models[:num_models], device)
    ]


def _names(
    config: Config, models: Sequence[nn.Module], device: torch.device
) -> list[tuple[str, str]]:
    """The strategies and dtypes of one cell, each once."""
    names: list[tuple[str, str]] = []
    for dtype, name in product(config.dtype, config.strategies):
        picked = best.pick(models, device.type, dtype) if name == BEST else name
        names += [(REFERENCE, "float32")] if name == BEST else []
        names.append((picked, dtype))
    names += [(SELF_CHECK, "float32")] if config.self_check else []
    return list(dict.fromkeys(names))


def run(
    config: Config,
    rows: Sequence[Result],
    models: Sequence[nn.Module],
    views: Callable[[int], Tensor],
    *,
    progress: Progress,
) -> Iterator[Result]:
    """Measure rows of `plan`; a failure costs its own row only.

    Args:
        config: how to measure.
        rows: what to measure, those of one cell together.
        models: float32 models on the device; the first N of them serve for each N.
        views: px -> `(count, 3, px, px)` float32 on the device; shared inputs are the first B of
            them, per-model inputs the first N * B.
    """
    limits = _limits(config, rows, next(models[0].parameters()).device)
    for (num_models, batch_size, image_size), cell in cells(rows).items():
        chosen = models[:num_models]
        _tidy()
        progress(f"{REFERENCE}, {num_models} models", "reference", 0.0)
        example = _inputs(views(image_size), config.inputs, num_models, batch_size)
        try:
            reference = _start(REFERENCE, chosen, example, torch.float32)
            cell = _with_weak_check_noted(cell, reference)
        except Exception as error:
            reason = _reason(error, REFERENCE, chosen, example, torch.float32)
            yield from (
                replace(row, status="failed", error=f"the reference failed: {reason}")
                for row in cell
            )
            continue
        cell = [_with_roofline(row, limits, chosen, example) for row in cell]
        exact = None
        if any(map(_rounds_apart, cell)):
            exact, notes = _optional("error to float64", partial(_in_float64, chosen, example))
            cell = [replace(row, notes=row.notes + notes) for row in cell]
        for row in cell:
            yield _measure(row, reference, exact, chosen, example, config, progress)


def _measure(
    row: Result,
    reference: Started,
    exact: Tensor | None,
    models: Sequence[nn.Module],
    example: Tensor,
    config: Config,
    progress: Progress,
) -> Result:
    _tidy()
    label = f"{row.strategy}, {row.num_models} models"
    dtype = getattr(torch, row.dtype)
    strategy = REFERENCE if row.strategy == SELF_CHECK else row.strategy
    try:
        progress(label, "build and first call", 0.0)
        started = reference if row.is_reference else _start(strategy, models, example, dtype)
        limit = TOLERANCES[dtype]
        verdict = check(started.logits, reference.logits, tolerance=limit)
        rounding = None if exact is None else check(started.logits, exact, tolerance=limit)
        row = replace(
            row,
            build_s=started.build_s,
            first_call_s=started.first_call_s,
            peak_memory_bytes=started.peak_memory_bytes,
            notes=row.notes + started.notes,
            max_rel_error=verdict.max_rel_error,
            error_float64=rounding.max_rel_error if rounding else None,
            top1=verdict.top1,
            top1_agreement=verdict.top1_agreement,
        )
        if verdict.problem:
            return replace(row, status="failed", error=verdict.problem)
        timed = _time(row, started, reference, config, lambda done: progress(label, "timing", done))
        # Later calls may differ from the first: memory that was freed is only now overwritten.
        last = check(started.forward(started.example), reference.logits, tolerance=limit)
        if last.problem:
            return replace(row, status="failed", error=f"after its timed calls, {last.problem}")
        return timed
    except UnavailableError as error:
        return replace(row, status="unavailable", error=str(error))
    except Exception as error:
        log.debug("%s failed", label, exc_info=True)
        reason = _reason(error, strategy, models, example, dtype)
        return replace(row, status="failed", error=reason)


def _start(name: str, models: Sequence[nn.Module], example: Tensor, dtype: torch.dtype) -> Started:
    """Build a strategy and call it twice. Its peak memory counts its models and all it adds."""
    device = example.device
    before, peak_known = memory.used_bytes(device), memory.reset_peak(device)
    synchronize(device)
    begin = time.perf_counter()
    own_models = models if dtype == torch.float32 else stacking.cast(models, dtype)
    own_example = example.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers, about their own tracing
        forward = strategies.build(name, own_models, own_example)
        synchronize(device)
        built = time.perf_counter()
        logits = forward(own_example)
    synchronize(device)
    called = time.perf_counter()
    # What a second call warns of, or compiles again, the timed calls would too.
    with warnings.catch_warnings(record=True) as caught, _no_recompilation():
        warnings.simplefilter("always")
        forward(own_example)
        synchronize(device)
    peak = memory.peak_bytes(device) if peak_known else None
    shared = sum(map(stacking.weight_bytes, models)) if own_models is models else 0
    return Started(
        forward=forward,
        example=own_example,
        logits=logits,
        build_s=built - begin,
        first_call_s=called - built,
        peak_memory_bytes=None if peak is None or before is None else peak - before + shared,
        notes=_notes(forward, caught),
    )


def _time(
    row: Result,
    started: Started,
    reference: Started,
    config: Config,
    progress: Callable[[float], None],
) -> Result:
    """Time the strategy in pairs with the reference; the reference row by itself."""
    functions = [lambda: reference.forward(reference.example)]
    if not row.is_reference:
        functions.append(lambda: started.forward(started.example))
    rounds, begin, before = [], time.perf_counter(), load.read()
    for samples in interleaved(
        functions,
        warmup=config.warmup,
        min_rounds=config.min_pairs,
        min_seconds=config.min_seconds,
        synchronize=lambda: synchronize(reference.example.device),
    ):
        rounds.append(samples)
        waited = (time.perf_counter() - begin) / config.min_seconds if config.min_seconds else 1.0
        progress(min(1.0, waited, len(rounds) / config.min_pairs))
    own = [samples[-1] for samples in rounds]
    paired = [] if row.is_reference else [samples[0] for samples in rounds]
    return replace(
        row,
        times_s=tuple(sample.seconds for sample in own),
        reference_times_s=tuple(sample.seconds for sample in paired),
        page_faults_per_call=_faults(own),
        reference_page_faults_per_call=_faults(paired),
        others_cpu_share=load.share_of_others(before, load.read()),
    )


def _limits(
    config: Config, rows: Sequence[Result], device: torch.device
) -> dict[str, tuple[roofline.Limits | None, tuple[str, ...]]]:
    """The device's limits in each dtype that a row has, with notes where they cannot be had.

    Measured once, and only if asked for.
    """
    if not config.roofline:
        return {}
    return {
        dtype: _optional("roofline", partial(roofline.measure, device, getattr(torch, dtype)))
        for dtype in dict.fromkeys(row.dtype for row in rows)
    }


def _with_roofline(
    row: Result,
    limits: dict[str, tuple[roofline.Limits | None, tuple[str, ...]]],
    models: Sequence[nn.Module],
    example: Tensor,
) -> Result:
    if row.dtype not in limits:
        return row
    own, notes = limits[row.dtype]
    if own is None:
        return replace(row, notes=row.notes + notes)
    dtype = getattr(torch, row.dtype)
    needed, notes = _optional(
        "roofline", partial(roofline.work, models[0], len(models), example, dtype)
    )
    least_s, bound = needed.least_seconds(own) if needed else (None, None)
    return replace(row, least_s=least_s, bound=bound, notes=row.notes + notes)


def _with_weak_check_noted(rows: list[Result], reference: Started) -> list[Result]:
    """Say so where the check could not tell some model's right input from a blank one."""
    blank = reference.forward(torch.zeros_like(reference.example))
    limit = 10 * TOLERANCES[torch.float32]
    pairs = zip(blank.split(1), reference.logits.split(1), strict=True)
    if not all(check(*pair, tolerance=limit).problem for pair in pairs):
        note = "the check is weak: with these weights the logits hardly depend on the image"
        return [replace(row, notes=(note,)) for row in rows]
    return rows


def _in_float64(models: Sequence[nn.Module], example: Tensor) -> Tensor:
    """The logits of the models in float64, one model after another."""
    inputs = example if example.dim() == 5 else [example] * len(models)
    with torch.inference_mode():
        return torch.stack(
            [
                stacking.cast([model], torch.float64)[0](own.double())
                for model, own in zip(models, inputs, strict=True)
            ]
        )


def _rounds_apart(row: Result) -> bool:
    return row.strategy in STRATEGIES and STRATEGIES[row.strategy].rounds_apart


def _optional(figure: str, function: Callable[[], T]) -> tuple[T | None, tuple[str, ...]]:
    """What `function` gives; where it fails None and a note of one line, because a figure beside
    the times must not cost the times."""
    try:
        return function(), ()
    except Exception as error:
        log.debug("no %s", figure, exc_info=True)
        reason = "out of memory" if _is_out_of_memory(error) else _first_line(error)
    _tidy()  # out of the handler, in which the error holds the frames that hold the memory
    return None, (f"no {figure}: {reason}",)


def _inputs(views: Tensor, inputs: str, num_models: int, batch_size: int) -> Tensor:
    if inputs == "shared":
        return views[:batch_size]
    own = views[: num_models * batch_size]
    return own.reshape(num_models, batch_size, *views.shape[1:])


def _faults(samples: Sequence[Any]) -> float | None:
    return median([sample.page_faults for sample in samples if sample.page_faults is not None])


def _notes(forward: Forward, caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    """The strategy's own note, and each operation that vmap had no batching rule for."""
    texts = dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught)
    own = getattr(forward, "note", None)
    return ((own,) if own else ()) + tuple(text for text in texts if "batching rule" in text)


def _reason(
    error: Exception,
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    dtype: torch.dtype,
) -> str:
    """One line that says why a row failed; for a lack of memory, with how many models would fit."""
    if not _is_out_of_memory(error):
        return _first_line(error)
    error.__traceback__ = None  # it holds the frames that hold the memory
    fits = _fitting(name, models, example, dtype)
    advice = f"{fits} would fit" if fits else "not even 1 would fit"
    return f"out of memory with {len(models)} models; {advice} (tried by halving)"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)  # a plain RuntimeError on the CPU


def _fitting(name: str, models: Sequence[nn.Module], example: Tensor, dtype: torch.dtype) -> int:
    count = len(models) // 2
    while count:
        _tidy()
        try:
            _start(name, models[:count], example[:count] if example.dim() == 5 else example, dtype)
            return count
        except Exception:
            count //= 2
    return 0


def _no_recompilation() -> contextlib.AbstractContextManager[object]:
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("fail_on_recompile")
    return contextlib.nullcontext()


def _tidy() -> None:
    """Forget what the last row compiled, and give its memory back."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    memory.release()
