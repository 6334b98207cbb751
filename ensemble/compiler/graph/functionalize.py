"""Trace a function to a functional graph of ATen operators: views are reshapes, nothing mutates.

Passes may then reorder, fuse and replace nodes without alias and mutation analysis.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo  # by `make_fx`, in its first trace: then a build would take a second longer
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ensemble.compiler.graph.analysis import value_of
from ensemble.compiler.graph.batching_rules import no_fallback_warnings, why_not_mapped
from ensemble.compiler.graph.canonicalize import remove_identities
from ensemble.compiler.graph.graph_module import recompile
from ensemble.errors import UnavailableError
from ensemble.machine.per_process import PerProcess

try:
    from functorch import make_fx
except ImportError:  # a torch that has dropped functorch
    from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

# A trace patches `nn.Module.__call__` for the whole process. Calls of models in other threads are
# safe, but two concurrent traces would leave the patch in place.
_TRACE_LOCK = PerProcess(threading.RLock)


def trace_functional(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], *, is_vmapped: bool = False
) -> fx.GraphModule:
    """The graph of `function(*arguments)`; a node's `meta["val"]` is a fake tensor.
    is_vmapped: the function is `torch.vmap` of such a graph, which rarely mutates.

    Views become reshapes and copies disappear: a pass may replace a node by one with other
    strides, and in a graph without mutation a copy is as good as a view.

    Raises:
        UnavailableError: torch cannot trace the function or functionalize its mutations, or the
            function reads strides.
    """
    try:
        with _TRACE_LOCK():
            if is_vmapped:
                with no_fallback_warnings():
                    module = _trace(function, arguments)
            else:
                module = _trace_functionalized(function, arguments)
            if _mutations(module):
                module = _trace(torch.func.functionalize(module), arguments)
    except UnavailableError:
        raise
    except Exception as error:  # a trace runs the model's own code, which may raise anything
        if is_vmapped:
            raise UnavailableError(why_not_mapped(error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "DataDependent" in type(error).__name__:
            reason = "its code asks for values that depend on its input"
        raise UnavailableError(f"torch cannot trace this model: {reason}") from error
    if mutations := _mutations(module):
        name = mutations[0]
        raise UnavailableError(f"this model mutates a tensor by an unsupported operator: {name}")
    if any(_has_unknown_size(node) for node in module.graph.nodes):
        raise UnavailableError("torch cannot trace this model: a size in it depends on values")
    if module.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        raise UnavailableError("this model reads a tensor by the order in which it lies in memory")
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    for node in module.graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        _use_nonnegative_bounds(node)
    for zeros in (aten.new_zeros.default, aten.zero.default):
        for node in module.graph.find_nodes(op="call_function", target=zeros):
            _make_independent(node)
    remove_identities(module.graph)
    return module


def _use_nonnegative_bounds(scatter: fx.Node) -> None:
    """Resolve negative slice bounds, which the batching rule of torch 2.14 refuses."""
    arguments: tuple[Any, ...] = scatter.args
    x, source, *rest = arguments
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, first, end, step = (*rest, *defaults[len(rest) :])
    first, end, _ = slice(first, end).indices(value_of(x).shape[dim])
    scatter.args = (x, source, dim, first, end, step)


def _make_independent(zeros: fx.Node) -> None:
    """Replace zeros like a tensor by zeros of its shape: a mask made of them has no batch dim."""
    known = value_of(zeros)
    zeros.target, zeros.args = aten.zeros.default, (list(known.shape),)
    zeros.kwargs = {"dtype": known.dtype, "device": known.device}


class _WithoutValues(TorchFunctionMode):
    """Refuses code that reads the memory of fake tensors, which have no values."""

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
        if func in self._READING or any(map(_has_no_storage, args)):
            reason = "its code asks for values that depend on its input"
            raise UnavailableError(f"torch cannot trace this model: {reason}")
        return func(*args, **(kwargs or {}))


def _has_no_storage(value: object) -> bool:
    """Is it a plain tensor without storage, as dlpack makes of a fake tensor?"""
    if type(value) is not Tensor or value.device.type != "cpu" or not value.numel():
        return False
    if torch._is_functional_tensor(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    return value.layout == torch.strided and value.data_ptr() == 0


def _trace_functionalized(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...]
) -> fx.GraphModule:
    """Functionalize during the trace, where functorch can. It cannot within an autograd function
    and some of torch's operators; the caller then functionalizes the traced graph."""
    try:
        return _trace(torch.func.functionalize(function), arguments)
    except UnavailableError:
        raise
    except Exception:
        return _trace(function, arguments)


def _trace(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    def call(*given: Tensor) -> Tensor:
        with _WithoutValues():
            return function(*given)

    # Constants in the function's closure are not fake tensors.
    module = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    for node in module.graph.nodes:
        if node.target in (aten.as_strided.default, aten.as_strided_.default) and _is_identity(
            node
        ):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    recompile(module)
    return module


def _is_identity(strided: fx.Node) -> bool:
    """Does `as_strided` keep size and strides? torch's mean over all pixels ends in such a node."""
    source, size, strides, *offset = strided.args
    known = value_of(source)
    assert isinstance(size, list | tuple)
    assert isinstance(strides, list | tuple)
    moved = any(
        length > 1 and before != after
        for length, before, after in zip(size, known.stride(), strides, strict=False)
    )
    return list(size) == list(known.shape) and not moved and not any(offset)


def _mutations(module: fx.GraphModule) -> list[str]:
    """The operators of a graph that mutate an argument."""
    calls = (node.target for node in module.graph.nodes if node.op == "call_function")
    operators = (target for target in calls if isinstance(target, torch._ops.OpOverload))
    return [str(target) for target in operators if target._schema.is_mutable]


def _has_unknown_size(node: fx.Node) -> bool:
    """Does its shape depend on values, as of a boolean mask?"""
    known = value_of(node)
    return isinstance(known, Tensor) and any(isinstance(n, torch.SymInt) for n in known.shape)
