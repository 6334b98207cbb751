"""A model as a graph of its modules, and which of these modules a pass may replace."""

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemble.errors import UnavailableError


@dataclass(frozen=True)
class Signature:
    """What is known of a tensor of the graph: enough to say whether two are formed alike."""

    shape: torch.Size
    dtype: torch.dtype


def traced(model: nn.Module) -> fx.GraphModule:
    """`model` as a graph of its modules.

    Raises:
        UnavailableError: torch.fx cannot trace it, or would leave out what surrounds its forward.
    """
    # A trace begins at the class's forward, so it would not see these.
    called_plainly = type(model).__call__ is nn.Module.__call__ or isinstance(model, fx.GraphModule)
    if not called_plainly or not is_bare(model):
        raise UnavailableError(
            "torch.fx cannot trace this model: it has hooks, or a call of its own, around forward"
        )
    try:
        with _left_as_it_was(model):
            return fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # a tracer runs the model's own code, which may raise anything
        raise UnavailableError(f"torch.fx cannot trace this model: {error}") from error


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's modules have the attributes that they had, and lists, dictionaries and
    sets among these hold what they held: a forward may keep what it forms, a trace its constants.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, list | deque | dict | set)
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for value, content in held:
            value.clear()
            value.update(content) if isinstance(value, dict | set) else value.extend(content)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what is formed of a buffer becomes a constant


def is_bare(module: nn.Module) -> bool:
    """Does a call of `module` run the forward of its class, and nothing around it?"""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def replaceable(model: nn.Module, graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The call sites of each module of `model` that is nothing to `graph` but those calls.

    Each site passes one value of the graph. The module has one name, no hooks, and tensors that no
    other module has and that the graph reads in no other way: a pass may put another in its place.
    """
    sites: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_module"):
        sites[str(node.target)].append(node)
    read = {str(node.target).rpartition(".")[0] for node in graph.find_nodes(op="get_attr")}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(
        id(tensor)
        for module in {id(module): module for module in model.modules()}.values()
        for tensor in _own_tensors(module)
    )

    def is_its_calls(name: str) -> bool:
        module = model.get_submodule(name)
        alone = names[id(module)] == 1 and all(
            owners[id(tensor)] == 1 for tensor in _own_tensors(module)
        )
        return alone and name not in read and is_bare(module)

    return {
        name: nodes
        for name, nodes in sites.items()
        if is_its_calls(name) and all(_passes_one_value(node) for node in nodes)
    }


def replaceable_once(model: nn.Module, graph: fx.Graph) -> dict[str, fx.Node]:
    """Those of `replaceable` that are called once, and where."""
    found = replaceable(model, graph)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def sign(module: fx.GraphModule, model: nn.Module, example: Tensor) -> None:
    """Run `module`, a trace of `model`, and note at each node the signature of its tensor.

    A trace takes one way through the model's code, and `isinstance(x, Tensor)` is false in it: so
    its result is compared with the model's own.

    Raises:
        UnavailableError: the trace computes something else than the model.
    """
    with _left_as_it_was(model):
        expected = model(example.clone())  # which may write over its input
        found = _Signing(module).run(example.clone())
    if type(found) is Tensor and not _is_close(found, expected):  # a fake tensor has no values
        raise UnavailableError(
            "torch.fx cannot trace this model: its trace gives another result than the model"
        )


class _Signing(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta["signature"] = Signature(result.shape, result.dtype)
        return result


def signature(node: object) -> Signature | None:
    """What `sign` noted at a node; None for what is no tensor, or no node."""
    return node.meta.get("signature") if isinstance(node, fx.Node) else None


def is_images(node: object) -> bool:
    """Is it a batch of images, `(B, C, H, W)`?"""
    known = signature(node)
    return known is not None and len(known.shape) == 4


def _own_tensors(module: nn.Module) -> list[Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _passes_one_value(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _is_close(found: Tensor, expected: object) -> bool:
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    exact = expected.double()
    scale = float(exact.nan_to_num(0, 0, 0).abs().amax()) if exact.numel() else 0.0
    return torch.allclose(found.double(), exact, rtol=0, atol=1e-3 * scale, equal_nan=True)
