"""What `torch.vmap` cannot map, and what it maps by a loop over the models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ensemble.compiler.graph.analysis import dependents
from ensemble.errors import first_line

# From torch's messages to ours. For a write into a shared tensor torch has several.
_FAILURES = (
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
    """Why `torch.vmap` cannot run a model that runs without it, in one line."""
    for pattern, reason in _FAILURES:
        if re.search(pattern, str(error)):
            return reason
    return f"vmap cannot run this model: {first_line(error).removeprefix('vmap: ')}"


def without_batching_rule(graph: fx.Graph, batched: Iterable[fx.Node]) -> list[str]:
    """Operators without a batching rule: `torch.vmap` loops over the models for them.

    batched: the placeholders that have a batch dimension.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = dict[str, None]()
    for node in dependents(graph, batched):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        name = node.target.name()
        keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition")
        if not any(has_kernel(name, key) for key in keys):
            found[name] = None
    return sorted(found)


def looped_note(names: Sequence[str]) -> str:
    """The note of a row for operators without a batching rule; empty for none."""
    rule = f"vmap has no batching rule for {', '.join(names)}"
    return f"{rule}: a loop over the models" if names else ""


@contextlib.contextmanager
def no_fallback_warnings() -> Iterator[None]:
    """Suppress torch's warning of each missing batching rule: a note reports it once."""
    set_enabled: Any = vars(torch._C._functorch)["_set_vmap_fallback_warning_enabled"]
    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(True)
