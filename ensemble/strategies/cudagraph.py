"""CUDA graphs: one launch for all kernels of a forward. CUDA only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.strategies import (
    compiled,
    concurrent,
    folded,
    im2col,
    lowered,
)
from ensemble.strategies.build_result import (
    BuildResult,
    RawForward,
    serialized,
)
from ensemble.strategies.forward import stack_outputs

WARMUP_CALLS = 3  # as in make_graphed_callables: lazy initialization must not be captured


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with its static input and output, and the owner of its other memory."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    logits: Tensor
    forward: RawForward  # not called again; keeps alive the weights that the graph reads

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return stack_outputs(self.logits, len(self.logits))  # before the next call replays into it


def _captured(
    builder: Callable[..., BuildResult],
    models: Sequence[nn.Module],
    example: Tensor,
    **options: Any,
) -> BuildResult:
    """Capture the forward of `builder`; a call copies x in, replays the graph, copies logits out.

    Source: torch's notes on CUDA semantics, "CUDA Graphs".
    """
    if example.device.type != "cuda":
        raise UnavailableError(f"CUDA graphs require a CUDA device, got {example.device}")
    built = builder(models, example, **options)
    forward = built.forward
    static_x = example.clone()
    side = torch.cuda.Stream(example.device)
    side.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            forward(static_x)
    torch.cuda.current_stream(example.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward(static_x)
        logits = stack_outputs(outputs, len(models))
    run = serialized(Captured(graph, static_x, logits, forward))
    return replace(built, forward=run)


loop = partial(_captured, folded.loop)
vmap = partial(_captured, folded.vmap)
compiled_loop = partial(_captured, compiled.loop)
compiled_vmap = partial(_captured, compiled.vmap)
eager_concurrent = partial(_captured, concurrent.eager)  # streams become branches of the graph
compiled_concurrent = partial(_captured, concurrent.compiled)
implicit_gemm_vmap = partial(_captured, lowered.implicit_gemm_vmap)
compiled_im2col_vmap = partial(_captured, im2col.compiled)  # by `compiler.operators.im2col`
