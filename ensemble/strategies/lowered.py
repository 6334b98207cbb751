"""The vmapped forward through our compiler: kernels for N models, on the CPU and on CUDA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ensemble.compiler.cuda.problem import DotPrecision
from ensemble.compiler.cuda.tuning import TileTuner
from ensemble.compiler.graph.batching_rules import looped_note
from ensemble.compiler.pipeline import CompiledForward, compile_vmapped
from ensemble.compiler.planning.gemm_tuning import GemmTuning
from ensemble.compiler.planning.kernel_accuracy import ErrorBound
from ensemble.compiler.runtime import serial_copy
from ensemble.errors import UnavailableError
from ensemble.machine import jit
from ensemble.machine.memory import unavailable_on_failure
from ensemble.machine.precision import Float32Precision, current_float32_precision
from ensemble.strategies import agreement
from ensemble.strategies.accuracy import OutputAccuracy
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.lowered_serving import CompiledModels
from ensemble.strategies.serving import Serving

Compile = Callable[[ErrorBound], CompiledForward]

MIN_CAPABILITY = (8, 0)  # of a CUDA device: tensor cores for bfloat16 and TF32


def vmap(models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float) -> BuildResult:
    """One forward of all models, with the fastest kernels that keep the outputs accurate: by numba
    on the CPU, on CUDA by Triton, as one CUDA graph.

    Raises:
        UnavailableError: the outputs are not those of the models, or the kernels cannot be compiled
            here.
    """
    if example.device.type == "cuda":
        from ensemble.strategies import cudagraph  # which imports torch.compile

        return cudagraph.implicit_gemm_vmap(models, example, tune_seconds=tune_seconds)
    if reason := jit.why_not():
        raise UnavailableError(f"the kernels are compiled by numba, but {reason}")
    x = agreement.informative(example)
    threads = torch.get_num_threads()

    def compiled(error_bound: ErrorBound) -> CompiledForward:
        return compile_vmapped(models, x, threads=threads, error_bound=error_bound)

    found, notes = _compile_accurately(models, x, compiled)
    kinds = Counter(step.kind.label for step in found.steps)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
    note = f"kernels: {counts}" if counts else "kernels: none, all by torch's own"
    left = ", ".join(f"{count} {name}" for name, count in found.by_torch.items())
    served = CompiledModels(found, x, len(models), threads)
    serving = Serving(
        served.weights,
        served.stage,
        served.plan,
        replan=served.replan,
        saved=served.saved,
        workspace=served.workspace,
    )
    built = _built(found, note, f"by torch: {left}" if counts and left else "", *notes)
    return replace(built, forward=served.run, serving=serving, kernels=kinds)


def implicit_gemm_vmap(
    models: Sequence[nn.Module], example: Tensor, *, tune_seconds: float
) -> BuildResult:
    """The forward on CUDA: convolutions by the Triton kernel, everything else by torch. Not
    captured yet.

    Raises:
        UnavailableError: the outputs are not those of the models; Triton is not installed, does not
            support the device, or cannot compile (no C compiler).
    """
    if reason := _why_not_triton(example.device):
        raise UnavailableError(reason)
    uses_tf32 = current_float32_precision() is Float32Precision.TF32
    precision = DotPrecision.TF32 if uses_tf32 else DotPrecision.TF32X3
    x, tuner = agreement.informative(example), TileTuner(tune_seconds)

    def compiled(error_bound: ErrorBound) -> CompiledForward:
        gemm = GemmTuning(precision, tuner, error_bound)
        return compile_vmapped(models, x, threads=1, error_bound=error_bound, gemm=gemm)

    with unavailable_on_failure("Triton's kernels fail here", but=(ValueError, UnavailableError)):
        found, notes = _compile_accurately(models, x, compiled)
    left = Counter(found.left)
    kernels = [
        f"{found.gemms} implicit GEMM",
        *(f"{n} by torch ({why})" for why, n in left.items()),
    ]
    if tuner.skipped:
        notes.append(f"{tuner.skipped} layers not tuned: autotuning budget exhausted")
    if tuner.errors:
        notes.append(f"{len(tuner.errors)} tiles fail here: {tuner.errors[0]}")
    return _built(found, f"kernels: {', '.join(kernels)}", *notes)


def _why_not_triton(device: torch.device) -> str:
    """Why Triton's kernels do not run on a device; empty if they may."""
    if find_spec("triton") is None:
        return "the kernels are compiled by Triton, which is not installed"
    if device.type != "cuda":
        return ""  # its interpreter
    found = torch.cuda.get_device_capability(device)
    if found >= MIN_CAPABILITY:
        return ""
    needed, has = (".".join(map(str, capability)) for capability in (MIN_CAPABILITY, found))
    return f"the kernels need compute capability {needed}, {device} has {has}"


def _built(found: CompiledForward, *notes: str) -> BuildResult:
    return BuildResult(
        lambda x: found.forward(serial_copy.contiguous(x)),
        "; ".join(filter(None, (*notes, looped_note(found.looped)))),
    )


def _compile_accurately(
    models: Sequence[nn.Module], example: Tensor, compiled: Compile
) -> tuple[CompiledForward, list[str]]:
    """Compile, and again under stricter error bounds while outputs for the example lose digits.

    Returns the forward, and notes of rejected kernels.

    Raises:
        UnavailableError: the outputs are not those of the models.
    """
    found, notes = compiled(ErrorBound.PER_LAYER), list[str]()
    has_fast_kernels = found.has_fast_kernels
    accuracy = OutputAccuracy(models, example, in_float64=has_fast_kernels)
    outputs = found.forward(serial_copy.contiguous(example))
    stricter = (ErrorBound.PER_CHANNEL_AND_PIXEL, "fewer"), (ErrorBound.NO_FAST_KERNELS, "no")
    for error_bound, left in stricter if has_fast_kernels else ():
        if not accuracy.loses_small_outputs(outputs):
            break
        del found  # one at a time is held
        found = compiled(error_bound)
        outputs = found.forward(serial_copy.contiguous(example))
        notes = [f"{left} fast kernels: small outputs lost digits next to large ones"]
    accuracy.check(outputs)
    return found, [*found.rejections, *notes]
