"""Compare the non-tensor state of models: one model's code may run for all only if it is equal."""

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
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - set(_HOOKS)  # of every module
_MAX_REPR = 60  # characters
CLASS = "__class__"
# Class attributes that do not affect behavior.
_IGNORED_CLASS_ATTRIBUTES = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__"),
    "__slotnames__",  # a cache of copy.copy
}


def fingerprint(model: nn.Module) -> dict[str, object]:
    """The class, attributes and hooks of each submodule, by qualified name: equal for models that
    differ only in the values of their tensors.

    Numbers, strings, containers, unregistered tensors and function code are compared by value,
    other objects by class and attributes. Parameters, buffers and the module tree are not included.
    """
    registered = {id(part): ("registered", name) for name, part in _registered(model)}
    found = {}
    for path, module in model.named_modules():
        recomputed = {_recomputed_by(hook) for hook in module._forward_pre_hooks.values()}
        found[f"{path}.{CLASS}" if path else CLASS] = _normalized(type(module), registered, {})
        for name in vars(module).keys() - _MODULE_ATTRIBUTES - recomputed:
            value = vars(module)[name]
            if name in _HOOKS:
                value = list(value.values())  # the keys are process-wide counters
            found[f"{path}.{name}" if path else name] = _normalized(value, registered, {})
    return found


def attribute_repr(model: nn.Module, name: str) -> str:
    """The shortened `repr` of the attribute under a key of `fingerprint`, for messages."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    text = " ".join(repr(vars(module).get(leaf) if leaf != CLASS else type(module)).split())
    return text if len(text) <= _MAX_REPR else f"{text[: _MAX_REPR - 3]}..."


def _registered(root: nn.Module) -> Iterator[tuple[str, object]]:
    yield from root.named_modules()
    yield from root.named_parameters()
    yield from root.named_buffers()


def _recomputed_by(hook: object) -> object:
    """The tensor that a hook of torch (`weight_norm`, `spectral_norm`, `prune`) recomputes from
    parameters in each call: it is not state."""
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)


def _normalized(
    value: Any, registered: Mapping[int, object], seen: dict[int, tuple[int, object]]
) -> object:
    """A representation that compares equal for values with the same behavior."""
    if id(value) in registered:
        return registered[id(value)]
    if value is None or isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)  # so that NaN == NaN, and 1 != True
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    seen[id(value)] = len(seen), value  # kept alive, so that its id is not reused

    def of(*parts: object) -> list[object]:
        return [_normalized(part, registered, seen) for part in parts]

    if isinstance(value, Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), _bytes(value)
    if isinstance(value, type):
        if _is_importable(value):
            return "class", value.__module__, value.__qualname__
        parts = {
            name: part
            for name, part in vars(value).items()
            if name not in _IGNORED_CLASS_ATTRIBUTES
        }
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
    """Whether the qualified name resolves to this class, rather than being local to a function."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _attributes(value: object) -> dict[str, object]:
    """The attributes by name, including slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _of_subclass(value: object) -> list[dict[str, object]]:
    """The attributes of an instance of a container subclass, if it has any."""
    return [found] if (found := _attributes(value)) else []


def _reduced(value: object) -> Iterator[object]:
    """The parts that `pickle` would write of an array or a Decimal; nothing for objects that it
    does not support, such as locks, which are compared by class only."""
    try:
        parts = value.__reduce_ex__(4)
    except Exception:
        return
    for part in [parts] if isinstance(parts, str) else parts:  # a str for built-in functions
        yield list(part) if isinstance(part, Iterator) else part


def _bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
