"""The vmapped forward with operators of its own, lowered to what depends on the images.

One model is traced and written by the operators of `ensemble.compiler`; `torch.vmap` maps that over
the stacked state, and their vmap rules choose kernels for N models. Whatever depends on the state
alone is constant-folded, and the rest runs as programs of kernels where there are such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.aten import graph_of
from ensemble.compiler.graph.data_movement import join_moves
from ensemble.compiler.graph.functionalize import looped_note, without_batching_rule
from ensemble.compiler.graph.operator_selection import with_operators
from ensemble.compiler.pipeline import Care, Lowered, lower
from ensemble.compiler.runtime import serial_copy
from ensemble.models import stacking
from ensemble.strategies import agreement
from ensemble.strategies.accuracy import Judge
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.compiled import as_one_graph


def vmap(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One vmapped forward over the stacked state, lowered to what depends on the image."""
    lowered, notes = _accurate(models, agreement.informative(example))
    kinds = Counter(operation.kind.label for operation in lowered.operations)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
    note = f"kernels: {counts}" if counts else "kernels: none, all by torch's own"
    return BuildResult(
        lambda x: lowered.forward(serial_copy.contiguous(x)),
        "; ".join(filter(None, (note, *notes, looped_note(lowered.looped)))),
    )


def _accurate(models: Sequence[nn.Module], example: Tensor) -> tuple[Lowered, tuple[str, ...]]:
    """The forward with the fastest kernels whose outputs for the example are those of the models,
    and which were refused.

    Raises:
        UnavailableError: with no kernels they are.
    """
    lowered, notes = lower_vmap(models, example), tuple[str, ...]()
    is_fast = any(operation.kind.attempts for operation in lowered.operations)
    judge = Judge(models, example, closely=is_fast)
    found = lowered.forward(serial_copy.contiguous(example))
    for care, kept in ((Care.EACH, "fewer"), (Care.EXACT, "no")) if is_fast else ():
        if not judge.loses_quiet_outputs(found):
            break
        del lowered  # one at a time is held
        lowered = lower_vmap(models, example, care=care)
        found = lowered.forward(serial_copy.contiguous(example))
        notes = (f"{kept} fast kernels: quiet outputs lay beside loud ones",)
    judge.check(found)
    return lowered, (*lowered.refused, *notes)


def compiled(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """The same through `torch.compile`: for where the operators are made of torch's own."""
    forward = as_one_graph(lower_vmap(models, example).forward)
    return BuildResult(lambda x: forward(x.contiguous()))


def lower_vmap(models: Sequence[nn.Module], example: Tensor, *, care: Care = Care.LAYER) -> Lowered:
    """The vmapped forward of the models by the operators of `ensemble.compiler`, lowered."""
    stacking.check_same_architecture(models)
    per_model = example.dim() == 5
    graph, names = graph_of(models[0], example[0] if per_model else example)
    join_moves(graph)
    with_operators(graph)
    in_dims = (*[0] * len(names), 0 if per_model else None)
    mapped: Callable[..., Tensor] = torch.vmap(graph, in_dims=in_dims)
    if not names and not per_model:  # all models give the same, and there is nothing to map over
        mapped = lambda x: (y := graph(x)).expand(len(models), *y.shape)  # noqa: E731
    stacked = stacking.stacked_state(models)
    state = {name: stacked[name] for name in names}
    del stacked  # the state is freed tensor by tensor, as it is packed
    # A trace holds for inputs that lie in memory as its example does.
    lowered = lower(
        mapped,
        state,
        example.contiguous(),
        num_models=len(models),
        threads=torch.get_num_threads(),
        care=care,
    )
    *of_state, x = graph.graph.find_nodes(op="placeholder")
    looped = without_batching_rule(graph.graph, [*of_state, *[x] * per_model])
    return replace(lowered, looped=tuple(looped))
