"""Detect references from a model's functions to the model, which `copy.deepcopy` does not rebind.

Functions are not copied. In a copy of the model, a hook that is a closure over the model, or that
writes to a dict which the model reads, still accesses the original's state. The same holds for weak
references.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# `_flat_weight_refs`: nn.RNNBase checks with it whether its flattened weights are up to date.
_REGISTERED = ("_modules", "_parameters", "_buffers", "_flat_weight_refs")
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType)


def find(model: nn.Module) -> str:
    """The name of a function or weak reference of `model` that refers to an object which a copy of
    the model would duplicate; empty if there is none."""
    functions: list[Any] = []
    owned: dict[int, object] = {}
    for module in model.modules():
        owned[id(module)] = module
    for tensor in (*model.parameters(), *model.buffers()):
        owned[id(tensor)] = tensor
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _REGISTERED:
                _collect(value, owned, functions)
    for function in functions:
        if any(id(value) in owned for value in _referents(function, set())):
            return getattr(function, "__qualname__", type(function).__name__)
    return ""


def _collect(value: Any, owned: dict[int, object], functions: list[Any]) -> None:
    """Add the objects in `value` that a deep copy duplicates to `owned`, functions and weak
    references, which it shares, to `functions`."""
    kind = type(value)  # not isinstance, which proxies may override by `__class__`
    if issubclass(kind, _ATOMS) or id(value) in owned or _is_of_torch(kind):
        return
    if issubclass(kind, types.FunctionType | weakref.ReferenceType):
        functions.append(value)
        return
    if issubclass(kind, types.MethodType):
        functions.append(value.__func__)
        _collect(value.__self__, owned, functions)
        return
    if not issubclass(kind, tuple | frozenset):  # immutable: sharing them is harmless
        owned[id(value)] = value
    for part in _parts(value):
        _collect(part, owned, functions)


def _is_of_torch(kind: type) -> bool:
    """Whether it is a class of torch (graph, generator, tensor) without user objects inside."""
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
    with contextlib.suppress(TypeError):  # no __dict__
        yield from list(vars(value).values())


def _referents(function: Any, seen: set[int]) -> Iterator[object]:
    """The objects that a function or weak reference refers to, also through nested functions."""
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
            yield from _referents(value, seen)


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
