"""Convolutions with weights packed once, and relu and residual fused into them: oneDNN on the CPU.

An eager convolution puts its weights into oneDNN's own blocked order at every call: more than the
arithmetic itself in the last stages of a ResNet. Compiling with frozen weights packs them once too,
at 3 to 4 s a model; here it costs milliseconds. The operators are those that Inductor calls; they
are private to torch, so `pack` asks whether they are there.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemble.errors import UnavailableError
from ensemble.folding import traced

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, nn.functional.relu)


class PackedConv2d(nn.Module):
    """`conv` on channels-last images, with `relu` after it; called with `other`, its sum with it.

    The sum is formed in the memory of `other`.
    """

    def __init__(self, conv: nn.Conv2d, input_size: torch.Size, *, relu: bool) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks input_size
        weight = conv.weight.detach().to_mkldnn()
        self.weight = reorder(weight, *self.geometry, list(input_size))
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.relu = relu

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        after = "relu" if self.relu else "none"
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, after, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            other,
            x,
            self.weight,
            self.bias,
            *self.geometry,
            "add",
            1.0,
            after if self.relu else None,
            [],
            "",
        )


def pack(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """`model` with its convolutions packed for inputs like `example` and fused with what follows.

    Raises:
        UnavailableError: not the CPU, no oneDNN or not its operators, a dtype that it lacks, or a
            model that torch.fx cannot trace.
    """
    _check(example)
    sizes: dict[str, torch.Size] = {}
    graph_module = traced(model)
    _remove_identities(graph_module)
    _Sizes(graph_module, sizes).run(example)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target in sizes:
            _pack_node(graph_module, node, sizes[node.target])
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


class _Sizes(fx.Interpreter):
    """Runs the model once and notes the input size of each convolution that can be packed."""

    def __init__(self, module: fx.GraphModule, sizes: dict[str, torch.Size]) -> None:
        super().__init__(module)
        self.sizes = sizes

    def call_module(self, target: object, args: tuple, kwargs: dict) -> object:
        conv = self.module.get_submodule(str(target))
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
        if plain and not isinstance(conv.padding, str):
            self.sizes[str(target)] = args[0].shape
        return super().call_module(target, args, kwargs)  # type: ignore[arg-type]


def _remove_identities(module: fx.GraphModule) -> None:
    """Folded batch norms stand between a convolution and its relu."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and type(module.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _pack_node(module: fx.GraphModule, node: fx.Node, input_size: torch.Size) -> None:
    conv = module.get_submodule(str(node.target))
    assert isinstance(conv, nn.Conv2d)
    last, other = node, None
    added = _only_user(node)
    if added is not None and added.target in _ADDS:
        other = next(argument for argument in added.args if argument is not node)
        if _may_be_overwritten(module, other, added):
            last = added
        else:
            other = None
    relu = _only_user(last)
    fused = relu is not None and _is_relu(module, relu)
    if fused:
        assert relu is not None
        last = relu
    name = f"{node.target}_packed".replace(".", "_")
    module.add_submodule(name, PackedConv2d(conv, input_size, relu=fused))
    with module.graph.inserting_before(last):
        arguments = (node.args[0],) if other is None else (node.args[0], other)
        last.replace_all_uses_with(module.graph.call_module(name, arguments))
    for old in (relu if fused else None, added if other is not None else None, node):
        if old is not None:
            module.graph.erase_node(old)


def _may_be_overwritten(module: fx.GraphModule, other: object, added: fx.Node) -> bool:
    """Is `other` a fresh result of the shape of the sum, that nothing reads after `added`?"""
    if not isinstance(other, fx.Node) or other.op != "call_module":
        return False
    producer = module.get_submodule(str(other.target))
    if not isinstance(producer, nn.Conv2d | PackedConv2d | nn.MaxPool2d):
        return False
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    return all(order[user] <= order[added] for user in other.users)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELUS


def _check(example: Tensor) -> None:
    if example.device.type != "cpu":
        raise UnavailableError(f"packed weights are oneDNN's, for the CPU, not {example.device}")
    if not torch.backends.mkldnn.is_available():
        raise UnavailableError("this torch was built without oneDNN")
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        raise UnavailableError("this torch does not have oneDNN's packed convolution")
    support = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if example.dtype in support and not support[example.dtype]():
        raise UnavailableError(f"oneDNN does not compute in {example.dtype} on this CPU")
