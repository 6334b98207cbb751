"""Models with prepacked weights and fused convolutions, as Inductor's, but built without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import channels_last
from ensemble.compiler.graph.prepacking import Packed, pack, packed_for_shape
from ensemble.compiler.runtime.instructions import instructions_of
from ensemble.machine.memory import unavailable_on_failure
from ensemble.strategies import agreement
from ensemble.strategies.accuracy import OutputAccuracy
from ensemble.strategies.build_result import BuildResult, PerModel, RawForward
from ensemble.strategies.concurrent import concurrent_forward
from ensemble.strategies.saved_run import CONCURRENT, EACH, SavedRun
from ensemble.strategies.serving import Commit, Serving, Undo
from ensemble.strategies.stacked_outputs import stack_outputs


def loop(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One prepacked forward per model, sequentially, each on all cores."""
    return _built(models, example, _sequential, EACH)


def concurrent(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One prepacked forward per model, one model per core."""
    return _built(models, example, concurrent_forward, CONCURRENT)


def _built(
    models: Sequence[nn.Module],
    example: Tensor,
    run: Callable[[Sequence[Packed], Tensor], RawForward],
    mode: str,
) -> BuildResult:
    packed = _packed(models, example)

    def plan(model: nn.Module | None, x: Tensor) -> RawForward:
        assert model is not None
        return run(packed_for_shape(model, x[0] if x.dim() == 5 else x, packed), x)

    def saved(_: RawForward, model: nn.Module | None, x: Tensor) -> SavedRun:
        assert model is not None
        of_shape = packed_for_shape(model, x[0] if x.dim() == 5 else x, packed)
        graph = instructions_of(of_shape[0].run)
        return SavedRun(mode, True, graph, [one.with_packings() for one in of_shape])

    def stage(index: int, model: nn.Module, _: Tensor) -> Commit:
        constants, new = packed[index].constants, packed[index].recipe.constants_of(model)

        def commit() -> Undo:
            old = list(constants)
            constants[:] = new
            return lambda: constants.__setitem__(slice(None), old)

        return commit

    def weights() -> list[Tensor]:
        return [tensor for one in packed for tensor in one.tensors()]

    return BuildResult(run(packed, example), serving=Serving(weights, stage, plan, saved=saved))


def _sequential(packed: Sequence[Packed], _: Tensor) -> RawForward:
    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        return PerModel([one(x[i] if x.dim() == 5 else x) for i, one in enumerate(packed)])

    return forward


def _packed(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    example = agreement.informative(example).contiguous()
    packed = pack(models, example[0] if example.dim() == 5 else example)
    x = channels_last(example)
    with unavailable_on_failure("the traced model fails on channels-last inputs"):
        found = PerModel([one(x[i] if x.dim() == 5 else x) for i, one in enumerate(packed)])
    accuracy = OutputAccuracy(models, example, in_float64=False)
    accuracy.check(stack_outputs(found, len(models)))
    return packed
