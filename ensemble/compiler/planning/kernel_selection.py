"""Which operators of a traced graph kernels can run, and as which steps of a program.

Those of `operators.stacked` become the step that the vmap rules chose. Beside them stand torch's
own that networks put between convolutions, on stacks of images `(N, B, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.functionalize import node_of
from ensemble.compiler.operators import stacked as stacks
from ensemble.compiler.planning.operation import Function, Kind, Operation

aten, ours = torch.ops.aten, torch.ops.ensemble

# Those that begin a program; torch's own by themselves are better left to torch.
KERNELS = (
    ours.packed_conv2d.default,
    ours.packed_max_pool2d.default,
    ours.packed_average_pool2d.default,
    ours.packed_select.default,
    ours.packed_affine.default,
    ours.packed_group_norm.default,
)


@dataclass(frozen=True)
class Trace:
    """What is known of a graph: tensors that x does not reach, and the number of each value.

    `nodes` are those that give the values now: a program's result takes the place of a node.
    """

    constants: dict[fx.Node, Tensor]
    numbers: dict[fx.Node, int]
    nodes: dict[int, fx.Node]
    num_models: int

    def tensor(self, node: Any) -> Any:
        """What a node gives: a constant, else a tensor without values; what is no node, itself."""
        if not isinstance(node, fx.Node):
            return node
        return self.constants[node] if node in self.constants else node.meta["val"]

    def stacks(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads that x reaches."""
        return [source for source in node.all_input_nodes if source not in self.constants]

    def is_stack(self, node: Any) -> bool:
        """Is it `(N, B, C, H, W)`, of values that x reaches and kernels take?"""
        if not isinstance(node, fx.Node) or node in self.constants:
            return False
        found = node.meta.get("val")
        if not isinstance(found, Tensor) or found.dim() != 5 or not stacks.is_ours(found):
            return False
        return len(found) == self.num_models and found.numel() > 0


def steps_of(node: fx.Node, trace: Trace) -> list[Operation]:
    """The steps that compute a node; none where there are no kernels for it, or where it brings
    several dtypes together: a program has one."""
    make = _MAKERS.get(node.target)
    if make is None or any(dtype_of(source) != dtype_of(node) for source in trace.stacks(node)):
        return []
    return make(node, trace)


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _weighted(make: Callable[..., Operation]) -> Callable[[fx.Node, Trace], list[Operation]]:
    """Of operators `(x, weight, bias, ...)`: a step keeps its weights, so x must not reach them."""

    def steps(node: fx.Node, trace: Trace) -> list[Operation]:
        weights = [weight for weight in node.args[1:3] if isinstance(weight, fx.Node)]
        if not all(weight in trace.constants for weight in weights):
            return []
        step = make(*map(trace.tensor, node.args))
        other = None if step.other is None else trace.numbers[node_of(node.args[3])]
        return [_numbered(step, node, trace, node.args[0], other)]

    return steps


def _weightless(make: Callable[..., Operation]) -> Callable[[fx.Node, Trace], list[Operation]]:
    def steps(node: fx.Node, trace: Trace) -> list[Operation]:
        return [_numbered(make(*map(trace.tensor, node.args)), node, trace, node.args[0])]

    return steps


def _numbered(
    step: Operation, node: fx.Node, trace: Trace, x: Any, other: int | None = None
) -> Operation:
    return replace(step, x=trace.numbers[node_of(x)], other=other, out=trace.numbers[node])


def _pointwise(kind: Kind, node: fx.Node, trace: Trace, x: Any, **options: Any) -> Operation:
    """A step on each number of x by itself."""
    found = trace.tensor(x)
    channels = found.shape[-3]
    step = Operation(kind, stacks.pointwise(found), 0, 0, channels=channels, out_channels=channels)
    other = options.pop("other", None)
    number = None if other is None else trace.numbers[other]
    return _numbered(replace(step, **options), node, trace, x, number)


def _activation(function: Function, *extra: float) -> Callable[[fx.Node, Trace], list[Operation]]:
    """Of `function(x, *extra)`."""

    def steps(node: fx.Node, trace: Trace) -> list[Operation]:
        x, *others = node.args
        if not trace.is_stack(x) or node.kwargs or tuple(others) != extra:
            return []
        return [_pointwise(Kind.ACTIVATION, node, trace, x, function=function)]

    return steps


def _leaky_relu(node: fx.Node, trace: Trace) -> list[Operation]:
    x, slope = (*node.args, 0.01)[:2]
    if not trace.is_stack(x) or node.kwargs or not isinstance(slope, float | int):
        return []
    options: dict[str, Any] = {"function": Function.LEAKY_RELU, "number": float(slope)}
    return [_pointwise(Kind.ACTIVATION, node, trace, x, **options)]


def _add(node: fx.Node, trace: Trace) -> list[Operation]:
    x, other = node.args[:2]
    if node.kwargs or not (trace.is_stack(x) and trace.is_stack(other)):
        return []
    if trace.tensor(x).shape != trace.tensor(other).shape:
        return []
    return [_pointwise(Kind.SUM, node, trace, x, other=other)]


def _multiply(node: fx.Node, trace: Trace) -> list[Operation]:
    """All pixels times one number for each channel: squeeze and excitation."""
    if not all(map(trace.is_stack, node.args[:2])):
        return []
    for x, factors in (node.args[:2], node.args[1::-1]):
        if trace.tensor(factors).shape == (*trace.tensor(x).shape[:3], 1, 1):
            return [_pointwise(Kind.SCALE, node, trace, x, other=factors)]
    return []


def _mean(node: fx.Node, trace: Trace) -> list[Operation]:
    """The mean over all pixels, kept as one."""
    x, dims, keep = (*node.args, False)[:3]
    if not trace.is_stack(x) or not keep or not is_of_pixels(dims) or node.kwargs:
        return []
    found = trace.tensor(x)
    whole = found.shape[-2:]
    step = stacks.average_pool2d_operation(found, whole, (1, 1), (0, 0), False, False)
    return [_numbered(step, node, trace, x)]


def is_of_pixels(dims: Any) -> bool:
    """Are these the last two of the dimensions of a stack?"""
    return isinstance(dims, list | tuple) and sorted(dim % 5 for dim in dims) == [3, 4]


def _concatenate(node: fx.Node, trace: Trace) -> list[Operation]:
    """Images side by side in their channels: a copy for each."""
    sources, dim = (*node.args, 0)[:2]
    assert isinstance(sources, list | tuple)
    if dim not in (2, -3) or node.kwargs or not all(map(trace.is_stack, sources)):
        return []
    result, first, steps = node.meta["val"], 0, []
    geometry = stacks.pointwise(result)
    for source in sources:
        step = _pointwise(Kind.COPY, node, trace, source, option=first)
        wide = replace(step.geometry, out_channels=geometry.out_channels)
        steps.append(replace(step, geometry=wide, out_channels=result.shape[-3]))
        first += trace.tensor(source).shape[-3]
    return steps


_MAKERS: dict[Any, Callable[[fx.Node, Trace], list[Operation]]] = {
    ours.packed_conv2d.default: _weighted(stacks.conv2d_operation),
    ours.packed_affine.default: _weighted(stacks.affine_operation),
    ours.packed_group_norm.default: _weighted(stacks.group_norm_operation),
    ours.packed_max_pool2d.default: _weightless(stacks.max_pool2d_operation),
    ours.packed_select.default: _weightless(stacks.select_operation),
    ours.packed_average_pool2d.default: _weightless(stacks.average_pool2d_operation),
    aten.relu.default: _activation(Function.RELU),
    aten.hardtanh.default: _activation(Function.RELU6, 0.0, 6.0),
    aten.sigmoid.default: _activation(Function.SIGMOID),
    aten.silu.default: _activation(Function.SILU),
    aten.hardsigmoid.default: _activation(Function.HARDSIGMOID),
    aten.hardswish.default: _activation(Function.HARDSWISH),
    aten.leaky_relu.default: _leaky_relu,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.mean.dim: _mean,
    aten.cat.default: _concatenate,
}

# Kernels that do an activation to what they write: relu in registers, or every one, just after.
TAKES_ALL = (Kind.DIRECT, Kind.DIRECT_BF16, Kind.GROUPED)
_TAKES_RELU = (
    *TAKES_ALL,
    *(Kind.WINOGRAD_2, Kind.WINOGRAD_4, Kind.STRASSEN, Kind.SUM, Kind.AFFINE, Kind.GROUP_NORM),
)


def with_activations_taken(steps: list[Operation], outputs: set[int]) -> list[Operation]:
    """The steps, where one that alone is read by an activation does that as well."""
    readers = [value for step in steps for value in step.reads]
    makers = {step.out: step for step in steps if not step.relu and not step.function}
    taken: dict[int, Operation] = {}  # by the value that only the activation reads
    for step in steps:
        maker = makers.get(step.x) if step.kind == Kind.ACTIVATION else None
        kinds = _TAKES_RELU if step.function == Function.RELU else TAKES_ALL
        if maker is None or maker.kind not in kinds or step.x in outputs:
            continue
        if readers.count(step.x) == 1:
            taken[step.x] = step
    gone = {step.out for step in taken.values()}
    return [
        _with_activation(step, taken[step.out]) if step.out in taken else step
        for step in steps
        if not (step.kind == Kind.ACTIVATION and step.out in gone)
    ]


def _with_activation(step: Operation, activation: Operation) -> Operation:
    is_relu = activation.function == Function.RELU
    function = Function.NONE if is_relu else activation.function
    number = activation.number if function else step.number
    return replace(step, relu=is_relu, function=function, number=number, out=activation.out)
