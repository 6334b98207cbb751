"""Build a strategy and call it twice: from its name to its steady state, with the costs."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.bench.measurement import Note
from ensemble.machine import jit, memory
from ensemble.machine.devices import synchronize
from ensemble.machine.dtypes import FLOAT32, NumericFormat, check_supported
from ensemble.machine.precision import float32_precision, switch_float32_precision
from ensemble.models import stacking
from ensemble.strategies import TUNE_SECONDS
from ensemble.strategies.forward import Forward

if TYPE_CHECKING:
    from ensemble.strategies.build_result import BuildResult, Choice, ForwardFn


def _is_ready() -> None:
    """Nothing to wait for."""


@dataclass(frozen=True)
class BuiltStrategy:
    """A strategy after its build and first two calls.

    `forward` gives logits `(N, B, classes)`; `timed_forward`, which is timed, their reduction.
    `ready` runs before each call, untimed: it sets the precision of float32 products on CUDA; over
    ranks it is the barrier. `held_bytes` and `bytes_per_model`: see `Forward`.
    """

    forward: ForwardFn
    timed_forward: ForwardFn
    example: Tensor
    logits: Tensor
    build_s: float
    first_call_s: float
    peak_memory_bytes: int | None
    notes: tuple[Note, ...]
    choice: Choice | None = None
    ready: Callable[[], None] = _is_ready
    numbers: NumericFormat = FLOAT32
    peak_reserved_bytes: int | None = None
    held_bytes: int | None = None
    bytes_per_model: int | None = None

    def call(self, example: Tensor | None = None) -> Tensor:
        """The result for the example, or for another like it."""
        self.ready()
        return self.timed_forward(self.example if example is None else example)


def build(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    numbers: NumericFormat,
    *,
    tune_seconds: float = TUNE_SECONDS,
) -> BuiltStrategy:
    """Build a strategy and call it twice, under its own precision of float32 products.

    Its peak memory includes its models. Neither time nor memory includes one-time costs: see
    `prepare`.

    Raises:
        UnavailableError: the device does not compute in this format.
        Exception: what the strategy raises.
    """
    check_supported(numbers, example.device)
    prepare(name, example.device)
    with float32_precision(numbers.float32_precision):
        return _build(name, models, example, numbers, tune_seconds=tune_seconds)


def _build(
    name: str,
    models: Sequence[nn.Module],
    example: Tensor,
    numbers: NumericFormat,
    *,
    tune_seconds: float,
) -> BuiltStrategy:
    device, dtype = example.device, numbers.dtype
    before, peak_known = memory.used_bytes(device), memory.reset_peak(device)
    reserved_before = memory.reserved_bytes(device)
    synchronize(device)
    begin = time.perf_counter()
    own_models = models if dtype == torch.float32 else stacking.cast(models, dtype)
    own_example = example.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers, about their own tracing
        built = strategies.build_unverified(
            name, own_models, own_example, tune_seconds=tune_seconds
        )
        synchronize(device)
        ready = time.perf_counter()
        logits = built.forward(own_example)
    synchronize(device)
    called = time.perf_counter()
    caught = _call_again(built.forward, own_example)
    peak = memory.peak_bytes(device) if peak_known else None
    peak_reserved = memory.peak_reserved_bytes(device)
    shared = sum(map(stacking.weight_bytes, models)) if own_models is models else 0
    forward = built.forward
    assert isinstance(forward, Forward)
    return BuiltStrategy(
        forward=forward,
        timed_forward=forward,
        example=own_example,
        logits=logits,
        build_s=ready - begin,
        first_call_s=called - ready,
        peak_memory_bytes=memory.increase(before, peak, shared),
        peak_reserved_bytes=memory.increase(reserved_before, peak_reserved, shared),
        notes=_notes(built, caught),
        choice=built.choice,
        ready=partial(switch_float32_precision, numbers.float32_precision, device),
        numbers=numbers,
        held_bytes=forward.memory_bytes,
        bytes_per_model=forward.bytes_per_model,
    )


def at_shape(built: BuiltStrategy, example: Tensor) -> BuiltStrategy:
    """A strategy prepared for inputs of another shape, over the same weights, and called twice.

    Its costs are those of the preparation; the peak memory is unknown.

    Raises:
        UnavailableError: the strategy does not support inputs of this shape.
        Exception: what the strategy raises.
    """
    forward, device = built.forward, example.device
    assert isinstance(forward, Forward)
    own_example = example.to(built.example.dtype)
    with float32_precision(built.numbers.float32_precision):
        synchronize(device)
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers, about their own tracing
            forward.prepare([tuple(own_example.shape)])
            synchronize(device)
            ready = time.perf_counter()
            logits = forward(own_example)
        synchronize(device)
        called = time.perf_counter()
        _call_again(forward, own_example)
    return replace(
        built,
        example=own_example,
        logits=logits,
        build_s=ready - begin,
        first_call_s=called - ready,
        peak_memory_bytes=None,
        peak_reserved_bytes=None,
        held_bytes=forward.memory_bytes,
    )


def prepare(name: str, device: torch.device) -> None:
    """Import what the strategy imports, and compile its kernels or read them from the cache.

    Raises:
        UnavailableError: what it needs is not installed.
    """
    strategy = strategies.get(name)
    strategy.builder()
    if strategy.has_kernels and device.type == "cpu" and jit.is_usable():
        from ensemble.compiler import kernels

        kernels.load()


def _call_again(forward: ForwardFn, example: Tensor) -> Sequence[warnings.WarningMessage]:
    """The warnings of a second call, which must not recompile: timed calls would do the same."""
    with warnings.catch_warnings(record=True) as caught, _no_recompilation():
        warnings.simplefilter("always")
        forward(example)
        synchronize(example.device)
    return caught


def release_compiled() -> None:
    """Reset torch.compile, collect garbage, and return freed memory to the system."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    memory.release()


def _no_recompilation() -> contextlib.AbstractContextManager[object]:
    if "torch._dynamo" in sys.modules:
        stance: contextlib.AbstractContextManager[object]
        stance = torch.compiler.set_stance("fail_on_recompile")
        return stance
    return contextlib.nullcontext()


def _notes(built: BuildResult, caught: Sequence[warnings.WarningMessage]) -> tuple[Note, ...]:
    """The choice, the strategy's note, and operators that vmap has no batching rule for."""
    texts = dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught)
    notes = [Note(built.note, built.details), Note(built.deferred_note())]
    if built.choice:
        notes.insert(0, Note(f"picked {built.choice.name}", f"tried: {built.choice.tried}"))
    notes += [Note(text) for text in texts if "batching rule" in text]
    return tuple(note for note in notes if note.text)
