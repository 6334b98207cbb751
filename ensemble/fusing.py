"""Relu and residual put into the convolution before them: a torch.fx pass over one model."""

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from ensemble.folding import traced

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, nn.functional.relu)

Make = Callable[[str, nn.Conv2d, bool], nn.Module]


def fuse(model: nn.Module, make: Make, *, in_place: bool) -> fx.GraphModule:
    """`model` with each plain convolution, and what follows it, replaced by one module.

    Args:
        model: batch norms folded away. Its modules are shared with the result, not copied.
        make: `(name, convolution, relu)` -> the module for it, called with x, or with x and a
            tensor to add before the relu. It takes the convolution's place and name.
        in_place: that module writes its result over what it adds, so only add what nobody reads
            afterwards.

    Raises:
        UnavailableError: torch.fx cannot trace the model.
    """
    graph_module = traced(model)
    _remove_identities(graph_module)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    made: set[str] = set()
    for node in calls:
        conv = graph_module.get_submodule(node.target)
        if is_plain(conv) and targets.count(node.target) == 1:
            assert isinstance(conv, nn.Conv2d)
            _fuse_node(graph_module, node, conv, make, made if in_place else None)
            made.add(node.target)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def is_plain(module: nn.Module) -> bool:
    """A convolution with zeros around the image, their number given."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _remove_identities(module: fx.GraphModule) -> None:
    """Folded batch norms stand between a convolution and its relu."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and type(module.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _fuse_node(
    module: fx.GraphModule, node: fx.Node, conv: nn.Conv2d, make: Make, made: set[str] | None
) -> None:
    """Replace one convolution; where results are formed in place, `made` are those before it."""
    last, arguments = node, [node.args[0]]
    added = _only_user(node)
    if added is not None and added.target in _ADDS:
        other = next(argument for argument in added.args if argument is not node)
        if isinstance(other, fx.Node) and (
            made is None or _may_be_overwritten(module, other, added, made)
        ):
            last, arguments = added, [node.args[0], other]
    relu = _only_user(last)
    fused = relu is not None and _is_relu(module, relu)
    path, _, leaf = str(node.target).rpartition(".")
    setattr(module.get_submodule(path), leaf, make(str(node.target), conv, fused))
    old = [node] if last is node else [last, node]
    if fused:
        assert relu is not None
        old = [relu, *old]
    with module.graph.inserting_before(old[0]):
        replacement = module.graph.call_module(str(node.target), tuple(arguments))
    old[0].replace_all_uses_with(replacement)
    for gone in old:
        module.graph.erase_node(gone)


def _may_be_overwritten(
    module: fx.GraphModule, other: fx.Node, added: fx.Node, made: set[str]
) -> bool:
    """Is `other` a fresh result of the shape of the sum, that nothing reads after `added`?"""
    if other.op != "call_module":
        return False
    fresh = isinstance(module.get_submodule(str(other.target)), nn.Conv2d | nn.MaxPool2d)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    return (fresh or other.target in made) and all(
        order[user] <= order[added] for user in other.users
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELUS
