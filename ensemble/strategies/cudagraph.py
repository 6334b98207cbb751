"""CUDA graphs: one launch for all kernels of a forward. CUDA only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.machine import cuda_graphs
from ensemble.strategies import (
    autotune,
    compiled,
    concurrent,
    folded,
    im2col,
    lowered,
)
from ensemble.strategies.build_result import BuildResult, RawForward, serialized
from ensemble.strategies.contexts import default_device, execution_context
from ensemble.strategies.stacked_outputs import stack_outputs

WARMUP_CALLS = 3  # as in make_graphed_callables: lazy initialization must not be captured


class LayoutBuilder(Protocol):
    """A builder with a choice of memory format."""

    def __call__(
        self, models: Sequence[nn.Module], example: Tensor, *, memory_format: torch.memory_format
    ) -> BuildResult: ...


@dataclass(frozen=True)
class Setting:
    """The memory format of images and weights, and whether cuDNN times its algorithms."""

    memory_format: torch.memory_format
    uses_cudnn_benchmark: bool


# cuDNN's heuristics are the quickest to build, so they come first.
SETTINGS = {
    "channels-last": Setting(torch.channels_last, False),
    "contiguous": Setting(torch.contiguous_format, False),
    "channels-last, cudnn.benchmark": Setting(torch.channels_last, True),
    "contiguous, cudnn.benchmark": Setting(torch.contiguous_format, True),
}


def _captured(
    builder: Callable[..., BuildResult],
    models: Sequence[nn.Module],
    example: Tensor,
    **options: Any,
) -> BuildResult:
    """The forward of `builder` as a CUDA graph; options: of the builder."""
    _require_cuda(example)
    return _graphed(builder(models, example, **options), example, len(models))


def _require_cuda(example: Tensor) -> None:
    if example.device.type != "cuda":
        raise UnavailableError(f"CUDA graphs require a CUDA device, got {example.device}")


def _graphed(built: BuildResult, example: Tensor, num_models: int) -> BuildResult:
    """A call copies x in, replays the graph, and copies the logits out.

    Source: torch's notes on CUDA semantics, "CUDA Graphs".
    """
    inner = built.serving

    def capture(forward: RawForward, x: Tensor) -> RawForward:
        stacked = lambda x: stack_outputs(forward(x), num_models)  # noqa: E731
        return serialized(cuda_graphs.graphed(stacked, x, warmup=WARMUP_CALLS))

    def plan(model: nn.Module | None, x: Tensor) -> RawForward:
        assert inner is not None
        return capture(inner.plan(model, x) if inner.plan else built.forward, x)

    # Graphs hold addresses: an exchange writes into the tensors of the folded copies.
    serving = inner and replace(inner, plan=plan, plans_in_seconds=True)
    return replace(built, forward=capture(built.forward, example), serving=serving)


def _fastest(
    builder: LayoutBuilder,
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    tune_seconds: float,
) -> BuildResult:
    """The forward of `builder` as a CUDA graph, in the fastest of `SETTINGS`."""
    _require_cuda(example)
    found = autotune.select_fastest(
        {
            name: partial(_in_setting, setting, builder, models, example)
            for name, setting in SETTINGS.items()
        },
        example,
        check=lambda logits: None,  # all candidates run the same function
        seconds=tune_seconds,
    )
    assert found.built is not None
    note = "; ".join(filter(None, (found.built.note, f"fastest setting: {found.name}")))
    return replace(found.built, note=note, details=f"tried: {found.tried}" if found.tried else "")


def _in_setting(
    setting: Setting, builder: LayoutBuilder, models: Sequence[nn.Module], example: Tensor
) -> BuildResult:
    built = builder(models, example, memory_format=setting.memory_format)
    capture = partial(_graphed, built, example, len(models))
    if not setting.uses_cudnn_benchmark:
        return capture()
    built.forward(example)  # here: the first call captures warnings, whose lock this thread holds
    return _with_cudnn_benchmark(capture, example)


def _with_cudnn_benchmark(capture: Callable[[], BuildResult], example: Tensor) -> BuildResult:
    """Capture with the algorithms that are fastest in cuDNN's own benchmark, in a new thread.

    torch caches cuDNN's choice for each convolution, made by heuristics or by benchmark, per
    thread. In this thread, where the forward has already run, the flag would change nothing. And
    what the new thread caches does not change other strategies of this process, or the reference.
    Source: `benchmark_cache` in aten/src/ATen/native/cudnn/Conv_v8.cpp.
    """

    def work() -> BuildResult:
        # The contexts of a build are those of a thread.
        with execution_context(example.device), default_device(example.device), _cudnn_benchmark():
            return capture()

    torch.cuda.synchronize(example.device)  # a new thread has another current stream
    with ThreadPoolExecutor(1, thread_name_prefix="ensemble") as pool:
        return pool.submit(work).result()


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """A context in which cuDNN times its algorithms; then the flag of the caller is restored."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


loop = partial(_fastest, folded.loop)
vmap = partial(_fastest, folded.vmap)
compiled_loop = partial(_captured, compiled.loop)
compiled_vmap = partial(_captured, compiled.vmap)
eager_concurrent = partial(_captured, concurrent.eager)  # streams become branches of the graph
compiled_concurrent = partial(_captured, concurrent.compiled)
implicit_gemm_vmap = partial(_captured, lowered.implicit_gemm_vmap)
compiled_im2col_vmap = partial(_captured, im2col.compiled)  # by `compiler.operators.im2col`
