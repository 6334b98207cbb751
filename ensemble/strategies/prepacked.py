"""Models with prepacked weights and fused convolutions, as Inductor's, but built without it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import channels_last
from ensemble.compiler.graph.prepacking import Packed, pack
from ensemble.machine.memory import unavailable_on_failure
from ensemble.strategies import agreement
from ensemble.strategies.accuracy import OutputAccuracy
from ensemble.strategies.build_result import BuildResult, PerModel
from ensemble.strategies.concurrent import concurrent_forward
from ensemble.strategies.forward import stack_outputs


def loop(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One prepacked forward per model, sequentially, each on all cores."""
    packed, per_model = _packed(models, example), example.dim() == 5

    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        return PerModel([one(x[i] if per_model else x) for i, one in enumerate(packed)])

    return BuildResult(forward)


def concurrent(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One prepacked forward per model, one model per core."""
    return concurrent_forward(_packed(models, example), example)


def _packed(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    example = agreement.informative(example).contiguous()
    packed = pack(models, example[0] if example.dim() == 5 else example)
    x = channels_last(example)
    with unavailable_on_failure("the traced model fails on channels-last inputs"):
        found = PerModel([one(x[i] if x.dim() == 5 else x) for i, one in enumerate(packed)])
    accuracy = OutputAccuracy(models, example, in_float64=False)
    accuracy.check(stack_outputs(found, len(models)))
    return packed
