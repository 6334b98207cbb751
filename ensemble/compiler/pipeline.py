"""The compiler's pipeline: from N models to one forward, by every pass in its order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemble.compiler.cuda.problem import DotPrecision
from ensemble.compiler.graph.analysis import operators_by_torch
from ensemble.compiler.graph.batching_rules import without_batching_rule
from ensemble.compiler.graph.canonicalize import (
    drop_expansions,
    keep_mean_dims,
    remove_identities,
)
from ensemble.compiler.graph.capture import capture
from ensemble.compiler.graph.channels_last import move_to_images
from ensemble.compiler.graph.constant_folding import (
    Folded,
    LayerCheck,
    State,
    embed_constants,
    fold_constants,
)
from ensemble.compiler.graph.data_movement import fold_data_movement
from ensemble.compiler.graph.decomposition import decompose
from ensemble.compiler.graph.functionalize import trace_functional
from ensemble.compiler.graph.gemm_selection import select_gemms
from ensemble.compiler.graph.graph_module import copied_graph, finished, forget_source, recompile
from ensemble.compiler.graph.narrow_inputs import widen_narrow_inputs
from ensemble.compiler.graph.operator_selection import select_operators
from ensemble.compiler.operators.conv2d import STACKED_CONV2D
from ensemble.compiler.operators.implicit_gemm import STACKED_CONV2D_BLOCK, precision_of
from ensemble.compiler.operators.lowering import lowering_context
from ensemble.compiler.planning.gemm_tuning import GemmTuning
from ensemble.compiler.planning.kernel_accuracy import ErrorBound, KernelAccuracyCheck
from ensemble.compiler.planning.kernel_selection import select_kernels
from ensemble.compiler.planning.step import Step
from ensemble.compiler.runtime.program_building import build_program
from ensemble.compiler.shared_weights import SharedWeights, WeightMap
from ensemble.models import stacking


@dataclass(frozen=True)
class CompiledForward:
    """`forward(x)`, and what a note reports of it.

    steps: of all programs.
    weights: which forwards for other shapes share.
    weight_map: where the parts of one model lie.
    gemms: convolutions by implicit GEMM, on CUDA.
    left: why other convolutions there are left to torch, one reason each.
    has_fast_kernels: some round more than the plain product does.
    rejections: layers whose fast kernel failed the accuracy check, with the reason.
    by_torch: operators that stay with torch at each call, and how many of each.
    looped: operators without a batching rule, which vmap runs by a loop over the models.
    """

    forward: fx.GraphModule
    steps: tuple[Step, ...]
    weights: SharedWeights
    weight_map: WeightMap
    rejections: tuple[str, ...]
    looped: tuple[str, ...]
    gemms: int = 0
    left: tuple[str, ...] = ()
    has_fast_kernels: bool = False
    by_torch: Mapping[str, int] = field(default_factory=dict)


def compile_vmapped(
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    threads: int,
    error_bound: ErrorBound = ErrorBound.PER_LAYER,
    gemm: GemmTuning | None = None,
) -> CompiledForward:
    """One forward of N models for inputs like `example`.

    Args:
        models: of one architecture, in eval mode.
        example: `(B, C, H, W)`, or `(N, B, C, H, W)`: a batch for each model. It should have
            contrast: the errors of fast kernels are measured on it.
        threads: cores to use.
        error_bound: which errors of fast kernels are too large.
        gemm: how the implicit GEMM on CUDA computes its products. Without it, on CUDA convolutions
            become batched matrix products of torch's.

    Raises:
        UnavailableError: torch cannot trace or vmap the models.
        ValueError: the models differ in architecture, or do not return one tensor.
    """
    stacking.check_same_architecture(models)
    one = _one_model(models[0], example, by_gemm=gemm is not None)
    example = example.contiguous()
    state = stacked_weights(models, one.names)
    module = _vmap(one.graph, state, example, num_models=len(models))

    # Weights: constant folding, which packs them, and the accuracy check of fast kernels.
    accuracy = KernelAccuracyCheck(error_bound)
    checks: dict[Any, LayerCheck] = {STACKED_CONV2D: accuracy}
    if gemm:
        checks[STACKED_CONV2D_BLOCK] = gemm
    folded = fold_constants(module, state, example, checks)
    weights = SharedWeights()
    weights.add(module, one.names, folded.constants)
    rejections = (*accuracy.rejections, *(gemm.rejections if gemm else ()))
    return _as_programs(module, folded, one, weights, len(models), threads, rejections)


def compile_for_shape(
    model: nn.Module, example: Tensor, weights: SharedWeights, *, num_models: int, threads: int
) -> CompiledForward:
    """The forward of N compiled models for inputs of another shape, over the same packed weights.

    Args:
        model: one of the models; its weights are not used.
        example: `(B, C, H, W)`, or `(N, B, C, H, W)`.
        weights: of a forward that `compile_vmapped` returned, on the CPU.
        num_models: N.
        threads: cores to use.

    Raises:
        UnavailableError: torch cannot trace or vmap the models for this shape, or they need other
            constants than those that `weights` holds.
    """
    one = _one_model(model, example, by_gemm=False)
    tensors = stacking.named_tensors(model)
    state = {name: _unfilled_stack(tensors[name], num_models) for name in one.names}
    module = _vmap(one.graph, state, example.contiguous(), num_models=num_models)
    folded = weights.restore(module, one.names)
    return _as_programs(module, folded, one, weights, num_models, threads, ())


@dataclass(frozen=True)
class _OneModel:
    """The graph of one model, `(*tensors, x)`; names: of those tensors. For `left` and `looped` see
    `CompiledForward`."""

    graph: fx.GraphModule
    names: tuple[str, ...]
    left: tuple[str, ...]
    looped: tuple[str, ...]


def _one_model(model: nn.Module, example: Tensor, *, by_gemm: bool) -> _OneModel:
    """The graph of one model: functional ATen operators, then ours."""
    is_per_model = example.dim() == 5
    graph, names = capture(model, example[0] if is_per_model else example)
    keep_mean_dims(graph.graph)
    drop_expansions(graph.graph)
    move_to_images(graph)
    decompose(graph)
    fold_data_movement(graph)
    select_operators(graph)  # and batch norm folding
    left = select_gemms(graph) if by_gemm else []
    if example.device.type == "cpu":
        widen_narrow_inputs(graph)
    looped = _operators_without_batching_rule(graph, is_per_model)
    return _OneModel(graph, tuple(names), tuple(left), tuple(looped))


def _as_programs(
    module: fx.GraphModule,
    folded: Folded,
    one: _OneModel,
    weights: SharedWeights,
    num_models: int,
    threads: int,
    rejections: tuple[str, ...],
) -> CompiledForward:
    """Programs: lowering to kernel steps, activation fusion, row tiling, memory planning."""
    vmapped = fx.GraphModule(module, copied_graph(module))
    forget_source(vmapped)
    context = lowering_context(module.graph, folded.constants, num_models)
    runs = select_kernels(module.graph, folded.dynamic, context)
    lowered = {node.name: tuple(steps) for run in runs for node, steps in run.items()}
    steps = [step for run in runs for step in build_program(module, run, context, threads)]
    embed_constants(module, folded)
    module.graph.lint()
    recompile(module)
    gemms = module.graph.find_nodes(op="call_function", target=STACKED_CONV2D_BLOCK)
    by_torch = operators_by_torch(module.graph)
    return CompiledForward(
        finished(module),
        tuple(steps),
        weights,
        WeightMap(finished(vmapped), one.names, lowered, dict(module.named_buffers())),
        rejections=rejections,
        looped=one.looped,
        gemms=len(gemms),
        left=one.left,
        by_torch=by_torch,
        has_fast_kernels=any(step.kind.fast_candidates for step in steps)
        or any(precision_of(node) is DotPrecision.TF32X3 for node in gemms),
    )


def _unfilled_stack(tensor: Tensor, num_models: int) -> Tensor:
    """A stack like N of this tensor, for a trace, which reads no values: its memory is never
    touched."""
    size, stride = (num_models, *tensor.shape), (tensor.numel(), *tensor.stride())
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)


def stacked_weights(models: Sequence[nn.Module], names: Sequence[str]) -> State:
    """These tensors of N models, stacked, by name. The caller may free them one by one."""
    stacked = stacking.stacked_state(models)
    return {name: stacked[name] for name in names}


def _vmap(
    one_model: fx.GraphModule, state: State, example: Tensor, *, num_models: int
) -> fx.GraphModule:
    """The graph of `(*state, x)` -> `(N, B, classes)`: vmap over stacked weights.

    The batching rules select convolution kernels by a cost model. A trace holds for inputs with the
    strides of its example.
    """
    is_per_model = example.dim() == 5
    in_dims = (*[0] * len(state), 0 if is_per_model else None)
    vmapped: Callable[..., Tensor] = torch.vmap(one_model, in_dims=in_dims)
    if not state and not is_per_model:  # nothing to map over: all models return the same
        vmapped = lambda x: (y := one_model(x)).expand(num_models, *y.shape)  # noqa: E731
    module = trace_functional(vmapped, (*state.values(), example), is_vmapped=True)
    remove_identities(module.graph)
    return module


def _operators_without_batching_rule(one_model: fx.GraphModule, is_per_model: bool) -> list[str]:
    *of_state, x = one_model.graph.find_nodes(op="placeholder")
    return without_batching_rule(one_model.graph, [*of_state, *[x] * is_per_model])
