"""Are models alike in what no tensor shows? What runs one model's code for all must know."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, range, slice)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_EVERY_MODULE = vars(nn.Module()).keys() - set(_HOOKS)
_LONGEST = 60  # characters of a value in a message


def described(model: nn.Module) -> dict[str, object]:
    """The attributes and hooks of each submodule: equal for models that differ in values alone.

    Compared by value: numbers, texts, containers, tensors that are no parameters or buffers, code
    of functions, and other objects by their class and attributes. Parameters, buffers and the tree
    of submodules are left to the caller.
    """
    registered = {id(part): ("registered", name) for name, part in _registered(model)}
    found = {}
    for path, module in model.named_modules():
        written = {_written_by(hook) for hook in module._forward_pre_hooks.values()}
        for name in vars(module).keys() - _OF_EVERY_MODULE - written:
            value = vars(module)[name]
            if name in _HOOKS:
                value = list(value.values())  # their keys count all hooks of the process
            found[f"{path}.{name}" if path else name] = _described(value, registered, {})
    return found


def value(model: nn.Module, name: str) -> str:
    """What `described` names `name`, for a message."""
    path, _, leaf = name.rpartition(".")
    text = " ".join(repr(vars(model.get_submodule(path)).get(leaf)).split())
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
    if isinstance(value, Mapping):
        return [type(value).__name__, *(of(key, item) for key, item in value.items())]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *of(*value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, of(*value)))]
    if isinstance(value, functools.partial):
        return ["partial", *of(value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", *of(value.__func__, value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, *of(value.__defaults__, value.__kwdefaults__, *cells)]
    if isinstance(value, nn.Module) or hasattr(value, "__dict__"):
        return [type(value).__qualname__, *of(vars(value))]
    return [type(value).__qualname__, *of(*_reduced(value))]


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
