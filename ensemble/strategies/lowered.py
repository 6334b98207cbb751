"""The vmapped forward through our compiler: kernels for N models on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batching_rules import looped_note
from ensemble.compiler.pipeline import CompiledForward, compile_vmapped
from ensemble.compiler.planning.kernel_accuracy import ErrorBound
from ensemble.compiler.runtime import serial_copy
from ensemble.errors import UnavailableError
from ensemble.machine import jit
from ensemble.strategies import agreement
from ensemble.strategies.accuracy import OutputAccuracy
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.compiled import as_one_graph


def vmap(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One forward of all models, with the fastest kernels that keep the outputs accurate.

    Raises:
        UnavailableError: the outputs are not those of the models, or numba cannot compile here.
    """
    if reason := jit.why_not():
        raise UnavailableError(f"the kernels are compiled by numba, but {reason}")
    found, notes = _compile_accurately(models, agreement.informative(example))
    kinds = Counter(step.kind.label for step in found.steps)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
    note = f"kernels: {counts}" if counts else "kernels: none, all by torch's own"
    return BuildResult(
        lambda x: found.forward(serial_copy.contiguous(x)),
        "; ".join(filter(None, (note, *notes, looped_note(found.looped)))),
    )


def compiled(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """The same through `torch.compile`: for devices where our operators decompose into torch's."""
    forward = as_one_graph(_compile(models, example, ErrorBound.PER_LAYER).forward)
    return BuildResult(lambda x: forward(x.contiguous()))


def _compile(
    models: Sequence[nn.Module], example: Tensor, error_bound: ErrorBound
) -> CompiledForward:
    threads = torch.get_num_threads()
    return compile_vmapped(models, example, threads=threads, error_bound=error_bound)


def _compile_accurately(
    models: Sequence[nn.Module], example: Tensor
) -> tuple[CompiledForward, list[str]]:
    """Compile, and again under stricter error bounds while outputs for the example lose digits.

    Returns the forward, and notes of rejected kernels.

    Raises:
        UnavailableError: the outputs are not those of the models.
    """
    found, notes = _compile(models, example, ErrorBound.PER_LAYER), list[str]()
    has_fast_kernels = any(step.kind.fast_candidates for step in found.steps)
    accuracy = OutputAccuracy(models, example, in_float64=has_fast_kernels)
    outputs = found.forward(serial_copy.contiguous(example))
    stricter = (ErrorBound.PER_CHANNEL_AND_PIXEL, "fewer"), (ErrorBound.NO_FAST_KERNELS, "no")
    for error_bound, left in stricter if has_fast_kernels else ():
        if not accuracy.loses_small_outputs(outputs):
            break
        del found  # one at a time is held
        found = _compile(models, example, error_bound)
        outputs = found.forward(serial_copy.contiguous(example))
        notes = [f"{left} fast kernels: small outputs lost digits next to large ones"]
    accuracy.check(outputs)
    return found, [*found.rejections, *notes]
