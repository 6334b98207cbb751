"""Are models alike in what no tensor shows? What runs one model's code for all must know."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, range, slice)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_EVERY_MODULE = vars(nn.Module()).keys() - set(_HOOKS)
_LONGEST = 60  # characters of a value in a message
CLASS = "__class__"
# Of a class's attributes, those that say where it stands and not what it does.
_OF_EVERY_CLASS = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__"),
    "__slotnames__",  # copy.copy keeps it there
}


def described(model: nn.Module) -> dict[str, object]:
    """The class, attributes and hooks of each submodule: equal for models that differ in values
    alone.

    Compared by value: numbers, texts, containers, tensors that are no parameters or buffers, code
    of functions, and other objects by their class and attributes. Parameters, buffers and the tree
    of submodules are left to the caller.
    """
    registered = {id(part): ("registered", name) for name, part in _registered(model)}
    found = {}
    for path, module in model.named_modules():
        written = {_written_by(hook) for hook in module._forward_pre_hooks.values()}
        found[f"{path}.{CLASS}" if path else CLASS] = _described(type(module), registered, {})
        for name in vars(module).keys() - _OF_EVERY_MODULE - written:
            value = vars(module)[name]
            if name in _HOOKS:
                value = list(value.values())  # their keys count all hooks of the process
            found[f"{path}.{name}" if path else name] = _described(value, registered, {})
    return found


def value(model: nn.Module, name: str) -> str:
    """What `described` names `name`, for a message."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    text = " ".join(repr(vars(module).get(leaf) if leaf != CLASS else type(module)).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _registered(root: nn.Module) -> Iterator[tuple[str, object]]:
    yield from root.named_modules()
    yield from root.named_parameters()
    yield from root.named_buffers()


def _written_by(hook: object) -> object:
    """The tensor that torch's own hooks form of parameters at each call: it is not state.

    `weight_norm`, `spectral_norm`, and `prune`.
    """
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)


def _described(
    value: Any, registered: Mapping[int, object], seen: dict[int, tuple[int, object]]
) -> object:
    """Something that is equal for two values where these do the same."""
    if id(value) in registered:
        return registered[id(value)]
    if value is None or isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)  # NaN is then equal to itself, and 1 not to True
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    seen[id(value)] = len(seen), value  # kept: its id is then no other's

    def of(*parts: object) -> list[object]:
        return [_described(part, registered, seen) for part in parts]

    if isinstance(value, Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), _bytes(value)
    if isinstance(value, type):
        if _is_importable(value):
            return "class", value.__module__, value.__qualname__
        parts = {name: part for name, part in vars(value).items() if name not in _OF_EVERY_CLASS}
        return ["class", value.__qualname__, *of(*value.__bases__, parts)]
    if isinstance(value, Mapping):
        items = (of(key, item) for key, item in value.items())
        return [type(value).__name__, *items, *of(*_of_subclass(value))]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *of(*value, *_of_subclass(value))]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, of(*value))), *of(*_of_subclass(value))]
    if isinstance(value, types.ModuleType):
        return "module", value.__name__
    if isinstance(value, property):
        return ["property", *of(value.fget, value.fset, value.fdel)]
    if isinstance(value, functools.partial):
        return ["partial", *of(value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", *of(value.__func__, value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, *of(value.__defaults__, value.__kwdefaults__, *cells)]
    if isinstance(value, nn.Module) or hasattr(value, "__dict__"):
        return [*of(type(value)), *of(_attributes(value))]
    return [type(value).__qualname__, *of(*_reduced(value))]


def _is_importable(kind: type) -> bool:
    """Is a class the one of its name, and not one of several that a function has made?"""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _attributes(value: object) -> dict[str, object]:
    """By name, those in slots too."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _of_subclass(value: object) -> list[dict[str, object]]:
    """The attributes of a container, where it has any."""
    return [found] if (found := _attributes(value)) else []


def _reduced(value: object) -> Iterator[object]:
    """What `pickle` would write of a value, an array or a decimal number say; of what it cannot
    write, as a lock, nothing: then only the class is known."""
    try:
        parts = value.__reduce_ex__(4)
    except Exception:
        return
    for part in [parts] if isinstance(parts, str) else parts:  # a built-in function has a name
        yield list(part) if isinstance(part, Iterator) else part


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
