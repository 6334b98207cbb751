"""Does a model's code refer to the model itself, in a way that `copy.deepcopy` does not follow?

A function is never copied: a hook that is a closure over the model, or that writes into a dict that
the model reads, goes on with the original's when it is called for a copy. The copy then computes
with what the original holds, or with what it held at another call. So do weak references.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# The last is of nn.LSTM and its like, which look whether their weights are still in one piece.
_REGISTERED = ("_modules", "_parameters", "_buffers", "_flat_weight_refs")
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType)


def to_itself(model: nn.Module) -> str:
    """The function, or weak reference, of `model` that refers to what a copy would have anew; empty
    where there is none."""
    functions: list[Any] = []
    owned: dict[int, object] = {}
    for module in model.modules():
        owned[id(module)] = module
    for tensor in (*model.parameters(), *model.buffers()):
        owned[id(tensor)] = tensor
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _REGISTERED:
                _own(value, owned, functions)
    for function in functions:
        if any(id(value) in owned for value in _referred(function, set())):
            return getattr(function, "__qualname__", type(function).__name__)
    return ""


def _own(value: Any, owned: dict[int, object], functions: list[Any]) -> None:
    """Add what a copy has anew of `value` to `owned`, and what it shares of code to `functions`."""
    kind = type(value)  # not isinstance, which asks the value: some answer with anything
    if issubclass(kind, _ATOMS) or id(value) in owned or _is_of_torch(kind):
        return
    if issubclass(kind, types.FunctionType | weakref.ReferenceType):
        functions.append(value)
        return
    if issubclass(kind, types.MethodType):
        functions.append(value.__func__)
        _own(value.__self__, owned, functions)
        return
    if not issubclass(kind, tuple | frozenset):  # these are equal wherever they are
        owned[id(value)] = value
    for part in _parts(value):
        _own(part, owned, functions)


def _is_of_torch(kind: type) -> bool:
    """A graph, a generator, a tensor: nothing of the user's is in it."""
    return kind.__module__.partition(".")[0] == "torch" and not issubclass(kind, nn.Module)


def _parts(value: Any) -> Iterator[object]:
    kind = type(value)
    if issubclass(kind, Mapping):
        yield from value.keys()
        yield from value.values()
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from value
    elif issubclass(kind, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    with contextlib.suppress(TypeError):  # of objects without a dict
        yield from list(vars(value).values())


def _referred(function: Any, seen: set[int]) -> Iterator[object]:
    """What a function or a weak reference refers to, through the functions among it too."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, weakref.ReferenceType):
        yield function()
        return
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    values = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [function.__globals__.get(name) for name in _names(function.__code__)]
    for value in values:
        yield value
        kind = type(value)
        if issubclass(kind, types.MethodType):
            yield value.__self__
        elif issubclass(kind, functools.partial | list | tuple | dict):
            yield from _parts(value)
    for value in cells:
        if issubclass(type(value), types.FunctionType | weakref.ReferenceType):
            yield from _referred(value, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return bool((cell.cell_contents,))
    except ValueError:
        return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
