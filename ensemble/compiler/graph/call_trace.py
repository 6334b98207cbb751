"""A call trace of a model: the list of torch functions that one forward calls.

The model's own code runs, and nothing of torch is patched, so other threads may call models
meanwhile. The trace shows which layer alone reads another's result (use-def analysis), and whether
two models call the same. It is no program that could run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# A value: ("state", name) for a tensor of the model, ("x",), ("result", call, position), or a
# description of anything else.
Value = tuple[object, ...]

# Metadata queries: they read no values.
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.type, Tensor.get_device),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "is_meta")
    ),
}
# They give a tensor's values to Python, whose control flow may depend on them.
_READS_VALUES = {
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__contains__),
    *(Tensor.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.nonzero, Tensor.argwhere),
    *(Tensor.unique, Tensor.masked_select, torch.is_nonzero, torch.equal, torch.allclose),
    *(torch.nonzero, torch.argwhere, torch.unique, torch.masked_select),
}


@dataclass(frozen=True)
class Call:
    """A torch function and its arguments."""

    function: object
    arguments: tuple[Value, ...]  # keyword arguments last, as ("by name", name, value)

    def reads(self) -> Iterator[Value]:
        """The tensors among its arguments, with repetition."""
        for argument in self.arguments:
            yield from _tensors_in(argument)


@dataclass(frozen=True)
class CallTrace:
    """The calls in order, and the output."""

    calls: tuple[Call, ...]
    output: Value
    result: object

    @property
    def reads_values(self) -> bool:
        """Did the model's code read values of a tensor? Its control flow may depend on them."""
        return any(call.function in _READS_VALUES for call in self.calls)

    def readers(self, value: Value) -> list[int]:
        """The calls that read a value, with repetition; the output counts as one more call."""
        found = [index for index, call in enumerate(self.calls) for v in call.reads() if v == value]
        return found + [len(self.calls)] * list(_tensors_in(self.output)).count(value)


def record(model: nn.Module, x: Tensor) -> CallTrace:
    """Call `model` with x, which it may mutate, and record the calls."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    recorder = _Recorder({id(tensor): ("state", name) for name, tensor in tensors})
    recorder.know(x, ("x",))
    with recorder:
        result = model(x)
    return CallTrace(tuple(recorder.calls), recorder.described(result), result)


class _Recorder(TorchFunctionMode):
    def __init__(self, known: dict[int, Value]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._known = known
        self._kept: list[object] = []  # keeps ids unique

    def know(self, tensor: Tensor, value: Value) -> None:
        self._known.setdefault(id(tensor), value)
        self._kept.append(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _METADATA:
            return result
        if func is Tensor.contiguous:  # the same values, copied or not
            self.know(result, self.described(args[0]))
            return result
        by_name = (("by name", name, self.described(value)) for name, value in kwargs.items())
        arguments = (*map(self.described, args), *by_name)
        for position, tensor in enumerate(_flat(result)):
            self.know(tensor, ("result", len(self.calls), position))
        self.calls.append(Call(func, arguments))
        return result

    def described(self, value: object) -> Value:
        """A description that is equal in the traces of two models of one architecture."""
        if isinstance(value, Tensor):
            unknown = ("constant", tuple(value.shape), value.dtype)
            return self._known.get(id(value), unknown)
        if isinstance(value, Mapping):
            return "mapping", *((str(key), self.described(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return "sequence", *map(self.described, value)
        return type(value).__name__, repr(value)


def _flat(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _flat(part)


def _tensors_in(value: object) -> Iterator[Value]:
    if not isinstance(value, tuple):
        return
    if value and value[0] in ("state", "x", "result"):
        yield value
        return
    for part in value:
        yield from _tensors_in(part)


def renumbered(trace: CallTrace, without: Mapping[int, Value]) -> CallTrace:
    """The trace without some calls, whose first results another value replaces."""
    kept = [index for index in range(len(trace.calls)) if index not in without]
    places = {index: place for place, index in enumerate(kept)}

    def moved(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        if not value or value[0] != "result":
            return tuple(moved(part) for part in value)
        _, call, *rest = value
        return moved(without[call]) if call in without else ("result", places[call], *rest)

    calls = (trace.calls[index] for index in kept)
    return CallTrace(
        tuple(Call(call.function, moved(call.arguments)) for call in calls),
        moved(trace.output),
        trace.result,
    )
