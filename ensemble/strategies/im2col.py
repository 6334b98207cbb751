"""The vmapped forward with convolutions as batched matrix products, through `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batching_rules import looped_note
from ensemble.compiler.pipeline import compile_vmapped
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.compiled import as_one_graph


def compiled(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """For devices where our operators decompose into torch's: `compiler.operators.im2col`."""
    found = compile_vmapped(models, example, threads=torch.get_num_threads())
    forward = as_one_graph(found.forward)
    return BuildResult(lambda x: forward(x.contiguous()), looped_note(found.looped))
