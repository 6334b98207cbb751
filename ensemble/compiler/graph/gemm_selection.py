"""Selection of the implicit GEMM on CUDA: which convolutions it computes, and what it fuses.

A pass over the graph of one model, after `operator_selection`: a convolution takes over the
activation that reads it, and a convolution by filters of one pixel whose result it adds (the
downsampling shortcut of a residual block).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ensemble.compiler.graph.analysis import dynamic_nodes, node_of, value_of
from ensemble.compiler.graph.graph_module import recompile
from ensemble.compiler.operators.activation import activation_in
from ensemble.compiler.operators.conv2d import CONV2D
from ensemble.compiler.operators.implicit_gemm import CONV2D_BLOCK
from ensemble.compiler.planning.step import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernel's offsets within the images of a model are 32 bits, those beyond the end of the last
# tile as well, of at most 1024 elements: wrapped around, they would pass for valid.
MAX_ELEMENTS = 2**31 - 1024


def select_gemms(module: fx.GraphModule) -> list[str]:
    """Let the implicit GEMM compute what it can, and return why other convolutions are left to
    torch, one reason each."""
    graph, left = module.graph, list[str]()
    dynamic = dynamic_nodes(graph)
    for node in graph.find_nodes(op="call_function", target=CONV2D):
        if reason := _why_not(node, dynamic):
            left.append(reason)
        else:
            _select(graph, node)
    for node in graph.find_nodes(op="call_function", target=CONV2D_BLOCK):
        _fuse_shortcut(graph, node)
    for node in graph.find_nodes(op="call_function", target=CONV2D_BLOCK):
        _fuse_activation(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    recompile(module)
    return left


def _why_not(node: fx.Node, dynamic: set[fx.Node]) -> str:
    """Why the implicit GEMM does not compute a convolution; empty if it does."""
    tensors = [value_of(argument) for argument in node.args[:4]]
    x, weight = tensors[:2]
    groups = node.args[7]
    if any(source in dynamic for source in node.args[1:3]):
        return "weights that depend on the input"
    if x.dtype not in DTYPES or any(isinstance(t, Tensor) and t.dtype != x.dtype for t in tensors):
        return f"{str(x.dtype).removeprefix('torch.')}"
    if groups != 1 and weight.shape[1] == 1:
        return "depthwise"
    result = value_of(node)
    if max(x.numel(), result.numel()) > MAX_ELEMENTS:
        return "images too large"
    return ""


def _select(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, other, stride, padding, dilation, groups, relu = node.args
    activation = int(Activation.RELU if relu else Activation.NONE)
    sizes = stride, padding, dilation, groups, [1, 1]
    _replace(graph, node, x, weight, bias, other, None, None, None, *sizes, activation)


def _replace(graph: fx.Graph, node: fx.Node, *arguments: object) -> None:
    """Replace a node by a `conv2d_block` that gives the same."""
    with graph.inserting_before(node):
        block = graph.call_function(CONV2D_BLOCK, arguments)  # type: ignore[arg-type]
    block.meta = node.meta
    node.replace_all_uses_with(block)
    graph.erase_node(node)


def _fuse_shortcut(graph: fx.Graph, node: fx.Node) -> None:
    """Add what a bare convolution gives by further steps of the same product."""
    other = node.args[3]
    if not isinstance(other, fx.Node) or not _is_bare(other) or _groups(node) != 1:
        return
    if node.args[0] is other:  # which the convolution reads as well
        return
    main, shortcut = (node, other) if _is_of_pixels(other) else (other, node)
    if not _is_of_pixels(shortcut) or _groups(main) != 1 or main.args[4] or shortcut.args[4]:
        return
    x, weight, bias, _, _, _, _, *sizes, _, _ = main.args
    added, its_weight, its_bias, _, _, _, _, its_stride, *_ = shortcut.args
    _replace(
        graph,
        node,
        *(x, weight, bias, None, added, its_weight, its_bias, *sizes, its_stride, node.args[-1]),
    )
    graph.erase_node(other)


def _is_bare(node: fx.Node) -> bool:
    """Is it a convolution by GEMM without an epilogue, and with one reader?"""
    if node.target is not CONV2D_BLOCK or len(node.users) != 1:
        return False
    return node.args[3] is None and node.args[4] is None and not node.args[-1]


def _is_of_pixels(node: fx.Node) -> bool:
    """Is it a convolution by filters of one pixel, without padding and groups?"""
    padding: Sequence[int] = node.args[8]  # type: ignore[assignment]
    shape = value_of(node.args[1]).shape
    return tuple(shape[2:]) == (1, 1) and not any(padding) and _groups(node) == 1


def _groups(node: fx.Node) -> int:
    groups = node.args[10]
    assert isinstance(groups, int)
    return groups


def _fuse_activation(graph: fx.Graph, node: fx.Node) -> None:
    """Take over the activation that alone reads a convolution."""
    users = list(node.users)
    if node.args[-1] or len(users) != 1:
        return
    activation = activation_in(users[0])
    if activation and node_of(users[0].args[0]) is node:
        node.args = (*node.args[:-1], int(activation))
        users[0].replace_all_uses_with(node)
        graph.erase_node(users[0])
