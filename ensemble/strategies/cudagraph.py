"""CUDA graphs: the kernels of a whole forward launched by one call. CUDA only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.strategies import (
    compiled,
    concurrent,
    folded,
    lowered,
)
from ensemble.strategies.build_result import (
    Builder,
    Built,
    Run,
    taking_turns,
)
from ensemble.strategies.forward import owned

WARMUP_CALLS = 3  # as torch.cuda.make_graphed_callables: lazy initialisation may not be captured


@dataclass(frozen=True)
class Captured:
    """A graph with the memory that it reads and writes, and what else that memory belongs to."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    logits: Tensor
    forward: Run  # never called again: it keeps the weights that the graph reads

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return owned(self.logits, len(self.logits))  # before the next call replays into it


def _captured(builder: Builder, models: Sequence[nn.Module], example: Tensor) -> Built:
    """Capture the forward of `builder`; calls copy x in, replay the graph, and copy logits out.

    Source: torch's notes on CUDA semantics, "CUDA Graphs".
    """
    if example.device.type != "cuda":
        raise UnavailableError(f"CUDA graphs need a CUDA device, this is {example.device}")
    built = builder(models, example)
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
        logits = owned(outputs, len(models))
    run = taking_turns(Captured(graph, static_x, logits, forward))
    return Built(run, built.note, later=built.later)


loop = partial(_captured, folded.loop)
vmap = partial(_captured, folded.vmap)
compiled_loop = partial(_captured, compiled.loop)
compiled_vmap = partial(_captured, compiled.vmap)
eager_concurrent = partial(_captured, concurrent.eager)  # streams become branches of the graph
compiled_concurrent = partial(_captured, concurrent.compiled)
compiled_im2col_vmap = partial(
    _captured, lowered.compiled
)  # by `ensemble.compiler.operators.matmul`
