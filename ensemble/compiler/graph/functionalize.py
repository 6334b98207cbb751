"""A function as a graph of torch's own operators (ATen), in which nothing writes over anything.

A pass may then move, join and replace nodes by looking at them alone.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ensemble.errors import UnavailableError, first_line
from ensemble.machine.per_process import PerProcess

try:
    from functorch import make_fx
except ImportError:  # a torch that has dropped functorch
    from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

# While torch traces, it has `nn.Module.__call__` replaced for the whole process. Calls of models in
# other threads go through that unharmed, but two traces at once would leave it replaced for good.
_ONE_AT_A_TIME = PerProcess(threading.RLock)

_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


def traced(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], *, is_mapped: bool = False
) -> fx.GraphModule:
    """The graph of `function(*arguments)`; a node's `meta["val"]` is a tensor without values.
    is_mapped: it is `torch.vmap` of such a graph, in which there are hardly writes.

    A view is a reshape, and no copy is left: what takes a node's place may lie in memory in another
    order than that did, and where nothing writes, one is as good as the other.

    Raises:
        UnavailableError: torch cannot trace it, or cannot take out what it writes, or it asks how
            a tensor lies in memory.
    """
    try:
        with _ONE_AT_A_TIME():
            if is_mapped:
                with no_fallback_warnings():
                    module = _graph_of(function, arguments)
            else:
                module = _functional(function, arguments)
            if _writes(module):
                module = _graph_of(torch.func.functionalize(module), arguments)
    except UnavailableError:
        raise
    except Exception as error:  # a trace runs the model's own code, which may raise anything
        if is_mapped:
            raise UnavailableError(why_not_mapped(error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "DataDependent" in type(error).__name__:
            reason = "its code asks for values that depend on its input"
        raise UnavailableError(f"torch cannot trace this model: {reason}") from error
    if writes := _writes(module):
        raise UnavailableError(f"this model writes over a tensor in a way of its own: {writes[0]}")
    if any(_has_unknown_size(node) for node in module.graph.nodes):
        raise UnavailableError("torch cannot trace this model: a size in it depends on values")
    if module.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        raise UnavailableError("this model reads a tensor by the order in which it lies in memory")
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    for node in module.graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        _count_from_the_front(node)
    for zeros in (aten.new_zeros.default, aten.zero.default):
        for node in module.graph.find_nodes(op="call_function", target=zeros):
            _untie(node)
    remove_identities(module.graph)
    return module


# torch's words -> ours. Of a write into what the models share it has several, by the dimensions.
_NOT_MAPPED = (
    (
        "vmap: inplace|doesn't match the broadcast shape",
        "vmap cannot write what differs by model into what the models share (in place)",
    ),
    (
        r"\.item\(\)|data-dependent|\.tolist\(\)|numpy|allclose|dynamic shape",
        "vmap cannot run this model: its code asks for values that depend on weights or input",
    ),
    (
        r"autograd\.Function|does not have vmap support",
        "vmap cannot run this model: a torch.autograd.Function in it has no setup_context or no"
        " rule for vmap",
    ),
)


def why_not_mapped(error: Exception) -> str:
    """Why `torch.vmap` cannot run what runs without it, in one line."""
    for pattern, reason in _NOT_MAPPED:
        if re.search(pattern, str(error)):
            return reason
    return f"vmap cannot run this model: {first_line(error).removeprefix('vmap: ')}"


def without_batching_rule(graph: fx.Graph, mapped: Iterable[fx.Node]) -> list[str]:
    """Operators that `torch.vmap` runs model after model, for it has no rule for them.

    mapped: the placeholders of what differs from model to model.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = dict[str, None]()
    for node in depending_on(graph, mapped):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        name = node.target.name()
        keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition")
        if not any(has_kernel(name, key) for key in keys):
            found[name] = None
    return sorted(found)


def looped_note(names: Sequence[str]) -> str:
    """What it means that vmap has no batching rule for these operators; nothing for none."""
    rule = f"vmap has no batching rule for {', '.join(names)}"
    return f"{rule}: a loop over the models" if names else ""


@contextlib.contextmanager
def no_fallback_warnings() -> Iterator[None]:
    """Without torch's warnings of missing batching rules: a note says it once."""
    set_enabled: Any = vars(torch._C._functorch)["_set_vmap_fallback_warning_enabled"]
    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(True)


def _count_from_the_front(scatter: fx.Node) -> None:
    """Bounds within the tensor: torch 2.14's vmap rule refuses those that count from the end."""
    arguments: tuple[Any, ...] = scatter.args
    x, source, *rest = arguments
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, first, end, step = (*rest, *defaults[len(rest) :])
    first, end, _ = slice(first, end).indices(value_of(x).shape[dim])
    scatter.args = (x, source, dim, first, end, step)


def _untie(zeros: fx.Node) -> None:
    """Zeros like a tensor are those of a shape: what is made of them, a mask, is of no model."""
    known = value_of(zeros)
    zeros.target, zeros.args = aten.zeros.default, (list(known.shape),)
    zeros.kwargs = {"dtype": known.dtype, "device": known.device}


class _WithoutValues(TorchFunctionMode):
    """Tensors of a trace have no values: code that reads their memory gets whatever lies there."""

    _READING = frozenset(
        {
            *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.storage),
            *(Tensor.untyped_storage, Tensor.__dlpack__, Tensor.__dlpack_device__),
            *(Tensor.apply_, Tensor.map_, Tensor.map2_),
        }
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in self._READING or any(map(_is_nowhere, args)):
            reason = "its code asks for values that depend on its input"
            raise UnavailableError(f"torch cannot trace this model: {reason}")
        return func(*args, **(kwargs or {}))


def _is_nowhere(value: object) -> bool:
    """Is it an ordinary tensor without memory? So is what dlpack makes of a tensor of a trace."""
    if type(value) is not Tensor or value.device.type != "cpu" or not value.numel():
        return False
    if torch._is_functional_tensor(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return value.layout == torch.strided and value.data_ptr() == 0


def _functional(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    """Writes are taken out while it is traced, where functorch can: not of a function that calls
    one of autograd, nor within some operators of torch; of a graph of either it can."""
    try:
        return _graph_of(torch.func.functionalize(function), arguments)
    except UnavailableError:
        raise
    except Exception:
        return _graph_of(function, arguments)


def _graph_of(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    def call(*given: Tensor) -> Tensor:
        with _WithoutValues():
            return function(*given)

    # Constants that the function holds are no fake tensors.
    module = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    for node in module.graph.nodes:
        if node.target in (aten.as_strided.default, aten.as_strided_.default) and _is_same(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    recompile(module)
    return module


def recompile(module: fx.GraphModule) -> None:
    """Let `module` do what its graph says by now."""
    forget_source(module)
    module.recompile()
    forget_source(module)


def forget_source(module: fx.GraphModule) -> None:
    """torch keeps, for tracebacks, the source of each graph that it ever compiled, and a build
    compiles several: not of this one."""
    name = type(module).forward.__code__.co_filename
    loader = getattr(fx.graph_module, "_loader", None)
    getattr(loader, "eval_cache", {}).pop(name, None)
    linecache.cache.pop(name, None)


def finished(module: fx.GraphModule) -> fx.GraphModule:
    """`module`, which no pass will change: its tensors are freed as soon as nobody has it.

    Its graph refers to it, so that else only the garbage collector would find them, which runs by
    the number of objects, not by their size.
    """
    module.graph.owning_module = None
    return module


def _is_same(strided: fx.Node) -> bool:
    """Does it find every element where it was? So does torch's mean over all pixels end, to say in
    which order its one pixel lies."""
    source, size, strides, *offset = strided.args
    known = value_of(source)
    assert isinstance(size, list | tuple)
    assert isinstance(strides, list | tuple)
    moved = any(
        length > 1 and before != after
        for length, before, after in zip(size, known.stride(), strides, strict=False)
    )
    return list(size) == list(known.shape) and not moved and not any(offset)


def _writes(module: fx.GraphModule) -> list[str]:
    """The operators of a graph that write over what they are given."""
    calls = (node.target for node in module.graph.nodes if node.op == "call_function")
    operators = (target for target in calls if isinstance(target, torch._ops.OpOverload))
    return [str(target) for target in operators if target._schema.is_mutable]


def remove_identities(graph: fx.Graph) -> None:
    """Take out what gives back what it is given, so that nothing comes between two kernels."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if node.target is aten.reshape.default:
            if source.target is aten.reshape.default:
                node.args = (source.args[0], *node.args[1:])
            before, after = value_of(node.args[0]), value_of(node)
            same = before is not None and before.shape == after.shape
        else:
            same = node.target in _COPIES
        if same:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _has_unknown_size(node: fx.Node) -> bool:
    """So has what a mask selects, even where the mask is always the same."""
    known = value_of(node)
    return isinstance(known, Tensor) and any(isinstance(n, torch.SymInt) for n in known.shape)


def is_random(node: fx.Node) -> bool:
    """Does a node draw random numbers?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    off = given.get("dropout_p", 0.0 if "dropout_p" in names else None) == 0.0
    return not off and given.get("training", given.get("train")) is not False


def is_images(node: object) -> bool:
    """Is it `(B, C, H, W)`?"""
    known = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(known, Tensor) and known.dim() == 4


def value_of(node: object) -> Any:
    """What is known of a node's result, a tensor without values; what is no node, as it is."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def node_of(value: object) -> fx.Node:
    """What must be a node, as one."""
    assert isinstance(value, fx.Node)
    return value


def reached(graph: fx.Graph) -> set[fx.Node]:
    """The last placeholder, the input of a call, and all nodes that depend on it."""
    return depending_on(graph, graph.find_nodes(op="placeholder")[-1:])


def depending_on(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that depend on one of them."""
    found = set(nodes)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
