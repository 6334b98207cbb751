"""Convolutions with weights packed once, and relu and residual fused into them: oneDNN on the CPU.

An eager convolution puts its weights into oneDNN's own blocked order at every call: more than the
arithmetic itself in the last stages of a ResNet. Compiling with frozen weights packs them once too,
at 3 to 4 s a model; here it costs milliseconds. The operators are those that Inductor calls; they
are private to torch, so `pack` asks whether they are there.

A model is traced and rewritten as for `lowered_vmap` (`passes.operators`). What depends on its
weights alone is computed once, and what is left is a graph of x and those constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ensemble.compiler.graph.aten import graph_of
from ensemble.compiler.graph.functionalize import (
    finished,
    forget_source,
    node_of,
    reached,
    value_of,
)
from ensemble.compiler.graph.operator_selection import with_operators
from ensemble.compiler.operators import conv
from ensemble.errors import UnavailableError
from ensemble.machine.dtypes import is_emulated
from ensemble.models import stacking

_ours = torch.ops.ensemble


@dataclass(frozen=True)
class Packed:
    """A model as a graph of x and constants. `run(*constants, x)` may be shared with others."""

    run: fx.GraphModule
    constants: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x, `(B, C, H, W)` -> logits. x is not written to, and best lies channels-last."""
        result: Tensor = self.run(*self.constants, x)
        return result


def pack(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    """The models with their convolutions packed for inputs like `example`, and fused with what
    follows. Models that are not alike are traced one by one.

    Args:
        models: in eval mode.
        example: `(B, C, H, W)`.

    Raises:
        UnavailableError: not the CPU, no oneDNN or not its operators, a dtype that it lacks, or
            models that torch cannot trace, or that are random.
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
    """Why oneDNN's packed convolution cannot run on this machine; nothing where it can."""
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
    ending: Any = ("add", 1.0, None, [], "")
    if other is None:
        result = torch.ops.mkldnn._convolution_pointwise(*layer, "none", [], "")
    elif in_place:
        result = torch.ops.mkldnn._convolution_pointwise_.binary(other, *layer, *ending)
    else:
        result = torch.ops.mkldnn._convolution_pointwise.binary(x, other, *layer[1:], *ending)
    # Not oneDNN's relu, which makes 0 of NaN: a broken image or weight would give an answer.
    return result.relu_() if relu else result


def _pack(models: Sequence[nn.Module], example: Tensor) -> list[Packed]:
    graph, names = graph_of(models[0], example)
    with_operators(graph)
    on_x = reached(graph.graph)
    run, sources = _partition(graph, on_x)
    return [
        Packed(run, _constants(graph, sources, on_x, [tensors[name] for name in names]))
        for tensors in map(stacking.named_tensors, models)
    ]


@dataclass(frozen=True)
class _Source:
    """Where a constant comes from: a node, and of a weight the convolution it is packed for."""

    node: fx.Node
    conv: fx.Node | None = None


def _partition(graph: fx.GraphModule, on_x: set[fx.Node]) -> tuple[fx.GraphModule, list[_Source]]:
    """What depends on x, as a graph of its own: `(*constants, x)`; and what the constants are."""
    sources: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
    target, made = fx.Graph(), dict[fx.Node, fx.Node]()
    x = graph.graph.find_nodes(op="placeholder")[-1]
    output = graph.graph.output_node()
    with target.inserting_before():  # constants go before all that is in the graph
        start = target.placeholder("x")
    made[x] = start

    def placed(node: fx.Node, conv: fx.Node | None = None) -> fx.Node:
        if node in on_x:
            return made[node]
        if (node, conv) not in sources:
            with target.inserting_before(start):
                sources[node, conv] = target.placeholder(f"constant_{len(sources)}")
        return sources[node, conv]

    for node in graph.graph.nodes:
        if node not in on_x or node is x or node is output:
            continue
        if node.target is _ours.conv2d.default and _is_packed(node, on_x):
            source, weight, bias, other, stride, padding, dilation, groups, relu = node.args
            tensors = [None if t is None else placed(node_of(t)) for t in (source, bias, other)]
            options = (stride, padding, dilation, groups, relu, _may_overwrite(node, on_x))
            arguments = (tensors[0], placed(node_of(weight), node), *tensors[1:], *options)
            made[node] = target.call_function(packed_conv2d, arguments)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), placed)
            function = _PLAIN.get(node.target, node.target)
            made[node] = target.call_function(function, args, kwargs)
    target.output(fx.node.map_arg(output.args[0], placed))
    target.lint()
    run = fx.GraphModule(nn.Module(), target)
    forget_source(run)
    return finished(run), [_Source(*key) for key in sources]


def _constants(
    graph: fx.GraphModule, sources: list[_Source], on_x: set[fx.Node], tensors: list[Tensor]
) -> tuple[Any, ...]:
    """The constants of one model, none of which shares memory with the model."""
    values: dict[fx.Node, Any] = dict(
        zip(graph.graph.find_nodes(op="placeholder")[:-1], tensors, strict=True)
    )
    for node in graph.graph.nodes:
        if node in on_x or node in values or node.op == "output":
            continue
        if node.op == "get_attr":
            values[node] = getattr(graph, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return tuple(_constant(source, values[source.node]) for source in sources)


def _constant(source: _Source, value: Any) -> Any:
    if source.conv is None:  # a number where the model's code asked a weight for its value
        return value.clone() if isinstance(value, Tensor) else value
    x, _, _, _, stride, padding, dilation, groups, _ = source.conv.args
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's size
    size = list(value_of(x).shape)
    packed: Tensor = reorder(value.to_mkldnn(), padding, stride, dilation, groups, size)
    return packed


def _is_packed(node: fx.Node, on_x: set[fx.Node]) -> bool:
    """Images, with weights of the model, and if a sum one of the result's shape and dtype?"""
    x, weight, bias, other, *_ = node.args
    if weight in on_x or bias in on_x or value_of(x).dim() != 4:
        return False
    known = [(t.shape, t.dtype) for t in map(value_of, (node, other)) if isinstance(t, Tensor)]
    return other is None or (len(known) == 2 and len(set(known)) == 1)


def _may_overwrite(node: fx.Node, on_x: set[fx.Node]) -> bool:
    """Is what is added memory that only nodes before this one read, in no view of it?"""
    x, _, _, other, *_ = node.args
    if not isinstance(other, fx.Node) or other not in on_x or not _is_fresh(other) or x is other:
        return False
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    readers = list(other.users)
    return all(user is node or (order[user] < order[node] and _is_fresh(user)) for user in readers)


def _is_fresh(node: fx.Node) -> bool:
    """Does a node give memory that it has formed itself?"""
    if node.op != "call_function":
        return False
    if node.target in (_ours.conv2d.default, *_PLAIN):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return False
    return node.target not in _MAY_BE_VIEWS


_MAY_BE_VIEWS = (torch.ops.aten.reshape.default,)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, *options: Any
) -> Tensor:
    stride, padding, dilation, groups, relu = options
    return conv.plain_conv2d(stride, padding, dilation, groups, relu, x, weight, bias, other)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In one pass over memory."""
    factors, summands = scale[:, None, None], shift[:, None, None]
    return torch.addcmul(summands, x.to(scale.dtype), factors).to(x.dtype)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    return functional.group_norm(x.contiguous(), groups, weight, bias, eps)  # else it loses digits


# Our operators by the functions of torch that compute them, without the way through a dispatcher.
_PLAIN: dict[Any, Callable[..., Tensor]] = {
    _ours.conv2d.default: _conv2d,
    _ours.max_pool2d.default: conv.plain_max_pool2d,
    _ours.average_pool2d.default: conv.plain_average_pool2d,
    _ours.group_norm.default: _group_norm,
    _ours.affine.default: _affine,
}
