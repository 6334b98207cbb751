"""Relu and residual put into the convolution before them: a torch.fx pass over one model."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ensemble.ops.tracing import node_of
from ensemble.passes.effects import OVERWRITES, effects
from ensemble.passes.tracing import (
    is_bare,
    is_images,
    replaceable,
    replaceable_once,
    sign,
    signature,
    traced,
)

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, nn.functional.relu)

Make = Callable[[nn.Conv2d, torch.Size, bool], nn.Module]


def fuse(model: nn.Module, example: Tensor, make: Make, *, in_place: bool) -> fx.GraphModule:
    """`model` with each plain convolution, and what follows it, replaced by one module.

    Only a convolution that is called once and is nothing else to the model is replaced, and only a
    sum of two tensors of one shape and dtype becomes part of it. Each node keeps its signature.

    Args:
        model: batch norms folded away. Its modules are shared with the result, not copied.
        example: `(B, C, H, W)`; the result is right for inputs like it.
        make: `(convolution, its input's shape, relu)` -> the module for it, called with x, or with
            x and a tensor to add before the relu. It takes the convolution's place and name.
        in_place: that module writes its result over what it adds, so only add what nobody reads
            afterwards.

    Raises:
        UnavailableError: torch.fx cannot trace the model.
    """
    module = traced(model)
    sign(module, model, example)
    _remove_identities(module)
    for name, node in replaceable_once(module, module.graph).items():
        conv = module.get_submodule(name)
        if is_plain(conv) and is_images(node.args[0]):
            assert isinstance(conv, nn.Conv2d)
            _fuse_node(module, node, conv, make, in_place=in_place)
    # Nodes that nobody reads stay: they may write over what somebody does.
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def is_plain(module: nn.Module) -> bool:
    """A convolution with zeros around the image, their number given."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _remove_identities(module: fx.GraphModule) -> None:
    """Folded batch norms stand between a convolution and its relu."""
    for name, nodes in replaceable(module, module.graph).items():
        if type(module.get_submodule(name)) is nn.Identity:
            for node in nodes:
                node.replace_all_uses_with(node_of(node.args[0]))
                module.graph.erase_node(node)


def _fuse_node(
    module: fx.GraphModule, node: fx.Node, conv: nn.Conv2d, make: Make, *, in_place: bool
) -> None:
    x = node_of(node.args[0])
    added = _sum_after(module, node, in_place=in_place)
    last, arguments = node, [x]
    if added is not None:
        last = added
        arguments += [node_of(argument) for argument in added.args if argument is not node]
    relu = _only_user(last)
    fused = relu is not None and _is_relu(module, relu)
    shape = signature(x)
    assert shape is not None
    module.set_submodule(str(node.target), make(conv, shape.shape, fused))
    with module.graph.inserting_before(last):
        replacement = module.graph.call_module(str(node.target), tuple(arguments))
    replacement.meta = {"signature": signature(last), OVERWRITES: in_place}
    gone = [relu] if fused and relu is not None else []
    gone += [last, node] if added is not None else [node]
    gone[0].replace_all_uses_with(replacement)
    for old in gone:
        module.graph.erase_node(old)


def _sum_after(module: fx.GraphModule, node: fx.Node, *, in_place: bool) -> fx.Node | None:
    """The sum that alone reads a convolution's result, if that may run in the sum's place."""
    added = _only_user(node)
    if added is None or added.op != "call_function" or added.target not in _ADDS:
        return None
    others = [argument for argument in added.args if argument is not node]
    if len(added.args) != 2 or len(others) != 1 or added.kwargs not in ({}, {"alpha": 1}):
        return None
    other, x = others[0], node_of(node.args[0])
    if not is_images(other) or not signature(node) == signature(other) == signature(added):
        return None
    other, known = node_of(other), effects(module, fresh=added)
    overwrites = in_place or (added.target is operator.iadd and added.args[0] is other)
    free = known.is_free_after(other, added) and other not in known.held[x]
    if not known.may_run_at(node, added, reading=x) or (overwrites and not free):
        return None
    return added


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        relu = module.get_submodule(str(node.target))
        return type(relu) is nn.ReLU and is_bare(relu)
    # In place or not: nobody else reads what it is of.
    plain = len(node.args) == 1 and node.kwargs.keys() <= {"inplace"}
    return node.op == "call_function" and node.target in _RELUS and plain
