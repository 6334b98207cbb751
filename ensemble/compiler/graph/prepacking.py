"""Prepacking: oneDNN convolutions with weights packed once, relu and residual fused, on the CPU.

An eager convolution reorders its weights to oneDNN's blocked layout at every call: more work than
the arithmetic in the last stages of a ResNet. `torch.compile` with frozen weights prepacks too, in
3 to 4 s a model; here it takes milliseconds. The operators are those that Inductor calls; they are
private to torch, so `pack` checks that they exist.

A model is captured and rewritten as for `lowered_vmap` (`operator_selection`). Constant folding of
its weights then leaves a graph of x and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ensemble.compiler.graph.analysis import dynamic_nodes, node_of, value_of, weight_nodes
from ensemble.compiler.graph.capture import capture
from ensemble.compiler.graph.expressions import Key, expression_keys
from ensemble.compiler.graph.graph_module import finished, forget_source, recompile
from ensemble.compiler.graph.operator_selection import select_operators
from ensemble.compiler.operators.affine import AFFINE
from ensemble.compiler.operators.conv2d import CONV2D, plain_conv2d
from ensemble.compiler.operators.group_norm import GROUP_NORM
from ensemble.compiler.operators.pooling import (
    AVERAGE_POOL2D,
    MAX_POOL2D,
    plain_average_pool2d,
    plain_max_pool2d,
)
from ensemble.compiler.runtime.packed_weight import PackedWeight
from ensemble.errors import UnavailableError
from ensemble.machine.dtypes import is_emulated
from ensemble.models import stacking


@dataclass(frozen=True)
class Packed:
    """A model as a graph of x and constants: `run(*constants, x)` may be shared by models, the list
    of constants by graphs for inputs of other shapes."""

    run: fx.GraphModule
    constants: list[Any]
    recipe: Recipe
    picks: tuple[int | Own, ...]  # of each argument: the constant of that number, or a value

    def __call__(self, x: Tensor) -> Tensor:
        """x, `(B, C, H, W)` -> logits. x is not mutated; channels-last is fastest."""
        result: Tensor = self.run(*self.arguments(), x)
        return result

    def arguments(self) -> list[Any]:
        """The constants in the order of the graph's arguments."""
        return [
            pick.value if isinstance(pick, Own) else self.constants[pick] for pick in self.picks
        ]

    def with_packings(self) -> list[Any]:
        """The constants, with packed weights as `PackedWeight`."""
        return [
            constant if source.conv is None else PackedWeight(constant, _sizes(source))
            for source, constant in zip(self.recipe.sources, self.arguments(), strict=True)
        ]

    def tensors(self) -> list[Tensor]:
        """The constants that are tensors."""
        return [constant for constant in self.constants if isinstance(constant, Tensor)]


@dataclass(frozen=True)
class Own:
    """A constant of one shape that depends on no weight, such as the size of an interpolation."""

    value: Any


@dataclass(frozen=True)
class Recipe:
    """How the constants of a graph are computed from a model's tensors: the captured graph, the
    names of the tensors that it reads, and the constants' sources."""

    graph: fx.GraphModule
    names: tuple[str, ...]
    sources: tuple[_Source, ...]

    def constants_of(self, model: nn.Module) -> list[Any]:
        """The constants of a model, which share no memory with it."""
        tensors = stacking.named_tensors(model)
        return _constants(self.graph, self.sources, [tensors[name] for name in self.names])

    def keys(self) -> list[tuple[Key, bool]]:
        """What each constant is: the expression that computes it, and whether it is packed."""
        keys = expression_keys(self.graph, self.names)
        return [(keys[source.node], source.conv is not None) for source in self.sources]


def packed_for_shape(model: nn.Module, example: Tensor, packed: Sequence[Packed]) -> list[Packed]:
    """Packed models for inputs of another shape, with the same constants.

    model: one of the models; its weights are not used.

    Raises:
        UnavailableError: torch cannot trace it for this shape, or the graph needs other constants.
    """
    if any(one.recipe is not packed[0].recipe for one in packed):
        raise UnavailableError(
            "models that differ in more than their weights are packed for one shape; build another"
            " forward with an example of this shape"
        )
    run, recipe = _captured(model, example)
    numbers = {key: number for number, key in enumerate(packed[0].recipe.keys())}
    of_weights, values = weight_nodes(recipe.graph.graph), recipe.constants_of(model)
    picks: list[int | Own] = []
    for source, key, value in zip(recipe.sources, recipe.keys(), values, strict=True):
        if key not in numbers and source.node in of_weights:
            raise UnavailableError(
                "inputs of this shape need other constants than those that this forward holds;"
                " build another forward with an example of that shape"
            )
        picks.append(numbers[key] if key in numbers else Own(value))
    return [Packed(run, one.constants, recipe, tuple(picks)) for one in packed]


def pack(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    """Prepack the models' convolutions for inputs like `example`, and fuse their epilogues.

    Models of different architectures are traced one by one.

    Args:
        models: in eval mode.
        example: `(B, C, H, W)`.

    Raises:
        UnavailableError: another device than the CPU, no oneDNN, a dtype that it lacks, or models
            that torch cannot trace or that draw random numbers.
    """
    reason = why_not(example.device.type, example.dtype)
    if reason:
        raise UnavailableError(reason)
    try:
        stacking.check_same_architecture(models)
    except ValueError:
        return [_pack([model], example)[0] for model in models]
    return _pack(models, example)


def why_not(device: str, dtype: torch.dtype) -> str:
    """Why oneDNN's packed convolution cannot run on this machine; empty if it can."""
    if device != "cpu":
        return f"packed weights are oneDNN's, for the CPU, not {device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return "this torch does not have oneDNN's packed convolution"
    known = (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in known or is_emulated(dtype, torch.device(device)):
        return f"oneDNN does not compute in {dtype} on this CPU"
    return ""


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    in_place: bool,
) -> Tensor:
    """`relu(conv2d(x) + other)` by a packed weight; in_place: in the memory of `other`."""
    layer = (x, weight, bias, padding, stride, dilation, groups)
    epilogue: Any = ("add", 1.0, None, [], "")
    if other is None:
        result = torch.ops.mkldnn._convolution_pointwise(*layer, "none", [], "")
    elif in_place:
        result = torch.ops.mkldnn._convolution_pointwise_.binary(other, *layer, *epilogue)
    else:
        result = torch.ops.mkldnn._convolution_pointwise.binary(x, other, *layer[1:], *epilogue)
    # Not oneDNN's relu, which turns NaN into 0 and would hide a broken image or weight.
    return result.relu_() if relu else result


def _make_batch_statistics_accurate(graph: fx.GraphModule) -> None:
    """Give batch norms that compute statistics contiguous images: channels-last, torch's sum
    squares in float32."""
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        if not node.args[5]:  # running statistics
            continue
        with graph.graph.inserting_before(node):
            options: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copy = graph.graph.call_function(aten.clone.default, (node.args[0],), options)
            copy.meta = dict(node_of(node.args[0]).meta)
        node.update_arg(0, copy)
    recompile(graph)


def _pack(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    run, recipe = _captured(models[0], example)
    picks = tuple(range(len(recipe.sources)))
    return [Packed(run, recipe.constants_of(model), recipe, picks) for model in models]


def _captured(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Recipe]:
    """The graph `(*constants, x)` of a model, and how its constants are computed."""
    graph, names = capture(model, example)
    _make_batch_statistics_accurate(graph)
    select_operators(graph)
    run, sources = _partition(graph, dynamic_nodes(graph.graph))
    return run, Recipe(finished(graph), tuple(names), tuple(sources))


@dataclass(frozen=True)
class _Source:
    """The source of a constant: a node, and for a weight the convolution that it is packed for."""

    node: fx.Node
    conv: fx.Node | None = None


def _partition(
    graph: fx.GraphModule, dynamic: set[fx.Node]
) -> tuple[fx.GraphModule, list[_Source]]:
    """The dynamic nodes as a graph `(*constants, x)`, and the sources of its constants."""
    sources: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
    target, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    x = graph.graph.find_nodes(op="placeholder")[-1]
    output = graph.graph.output_node()
    with target.inserting_before():  # constants precede all other nodes
        start = target.placeholder("x")
    copies[x] = start

    def copied(node: fx.Node, conv: fx.Node | None = None) -> fx.Node:
        if node in dynamic:
            return copies[node]
        if (node, conv) not in sources:
            with target.inserting_before(start):
                sources[node, conv] = target.placeholder(f"constant_{len(sources)}")
        return sources[node, conv]

    for node in graph.graph.nodes:
        if node not in dynamic or node is x or node is output:
            continue
        if node.target is CONV2D and _is_packed(node, dynamic):
            source, weight, bias, other, stride, padding, dilation, groups, relu = node.args
            tensors = [None if t is None else copied(node_of(t)) for t in (source, bias, other)]
            options = (stride, padding, dilation, groups, relu, _may_overwrite(node, dynamic))
            arguments = (tensors[0], copied(node_of(weight), node), *tensors[1:], *options)
            copies[node] = target.call_function(packed_conv2d, arguments)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied)
            function = _PLAIN.get(node.target, node.target)
            copies[node] = target.call_function(function, args, kwargs)
    target.output(fx.node.map_arg(output.args[0], copied))
    target.lint()
    run = fx.GraphModule(nn.Module(), target)
    forget_source(run)
    return finished(run), [_Source(*key) for key in sources]


def _constants(
    graph: fx.GraphModule, sources: Sequence[_Source], tensors: list[Tensor]
) -> list[Any]:
    dynamic = dynamic_nodes(graph.graph)
    values: dict[fx.Node, Any] = dict(
        zip(graph.graph.find_nodes(op="placeholder")[:-1], tensors, strict=True)
    )
    for node in graph.graph.nodes:
        if node in dynamic or node in values or node.op == "output":
            continue
        if node.op == "get_attr":
            values[node] = getattr(graph, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return [_constant(source, values[source.node]) for source in sources]


def _constant(source: _Source, value: Any) -> Any:
    if source.conv is None:  # a number, where the model's code read a weight's value
        return value.clone() if isinstance(value, Tensor) else value
    return PackedWeight(value, _sizes(source)).pack()


def _sizes(source: _Source) -> tuple[Any, ...]:
    """The arguments of the packing of a weight."""
    arguments: tuple[Any, ...] = node_of(source.conv).args
    x, _, _, _, stride, padding, dilation, groups, _ = arguments
    return padding, stride, dilation, groups, list(value_of(x).shape)


def _is_packed(node: fx.Node, dynamic: set[fx.Node]) -> bool:
    """Has it images, constant weights, and a residual, if any, of the result's shape and dtype?"""
    x, weight, bias, other, *_ = node.args
    if weight in dynamic or bias in dynamic or value_of(x).dim() != 4:
        return False
    known = [(t.shape, t.dtype) for t in map(value_of, (node, other)) if isinstance(t, Tensor)]
    return other is None or (len(known) == 2 and len(set(known)) == 1)


def _may_overwrite(node: fx.Node, dynamic: set[fx.Node]) -> bool:
    """May the result overwrite the residual: no view of it, and all other readers come before?"""
    x, _, _, other, *_ = node.args
    if not isinstance(other, fx.Node) or other not in dynamic or not _is_fresh(other) or x is other:
        return False
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    readers = list(other.users)
    return all(user is node or (order[user] < order[node] and _is_fresh(user)) for user in readers)


def _is_fresh(node: fx.Node) -> bool:
    """Does a node allocate its result (alias analysis)?"""
    if node.op != "call_function":
        return False
    if node.target in (CONV2D, *_PLAIN):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return False
    return node.target not in _MAY_BE_VIEWS


_MAY_BE_VIEWS = (torch.ops.aten.reshape.default,)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *options: Any
) -> Tensor:
    stride, padding, dilation, groups, relu = options
    return plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """One pass over memory."""
    factors, summands = scale[:, None, None], shift[:, None, None]
    return torch.addcmul(summands, x.to(scale.dtype), factors).to(x.dtype)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    return functional.group_norm(
        x.contiguous(), groups, weight, bias, eps
    )  # channels-last is inaccurate


# Our operators as plain functions of torch, without the dispatcher's overhead.
_PLAIN: dict[Any, Callable[..., Tensor]] = {
    CONV2D: _conv2d,
    MAX_POOL2D: plain_max_pool2d,
    AVERAGE_POOL2D: plain_average_pool2d,
    GROUP_NORM: _group_norm,
    AFFINE: _affine,
}
FUNCTIONS = (packed_conv2d, *_PLAIN.values())  # that a packed graph calls
