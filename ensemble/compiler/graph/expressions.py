"""Keys of the expressions of a graph: equal keys compute the same constant.

A graph is traced for inputs of one shape. Those of other shapes of the same models compute the same
constants from the same weights, so they share these by key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Key = str


def expression_keys(module: fx.GraphModule, state_names: Sequence[str]) -> dict[fx.Node, Key]:
    """The key of every node that does not depend on the input, which is the last placeholder.

    state_names: of the other placeholders, in order.
    """
    keys: dict[fx.Node, Key] = {}
    placeholders = module.graph.find_nodes(op="placeholder")[:-1]
    for node, name in zip(placeholders, state_names, strict=True):
        keys[node] = _digest("state", name)
    for node in module.graph.nodes:
        if node in keys or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            keys[node] = _digest("value", _content(getattr(module, str(node.target))))
        elif all(source in keys for source in node.all_input_nodes):
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: _Known(keys[n]))
            keys[node] = _digest("call", f"{node.op} {node.target} {_text(arguments)}")
    return keys


class _Known(str):
    """The key of an argument, as text."""


def _text(value: Any) -> str:
    if isinstance(value, _Known):
        return f"<{value}>"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(each)}' for key, each in sorted(value.items()))}}}"
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, int) and not isinstance(value, bool):
        return f"int {int(value)}"  # a kernel's kind is an enum, in a traced graph a number
    return f"{type(value).__name__} {value}"


def _content(value: Any) -> str:
    """A tensor's dtype, shape and bytes; anything else as text."""
    if not isinstance(value, Tensor):
        return _text(value)
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def _digest(kind: str, text: str) -> Key:
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()
