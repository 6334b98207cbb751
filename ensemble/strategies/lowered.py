"""The vmapped forward with operators of its own, lowered to what depends on the images.

One model is traced and written by the operators of `ensemble.ops`; `torch.vmap` maps that over the
stacked state, and their vmap rules choose kernels for N models. What comes of it loses all that the
state alone decides, and what is left runs as programs of kernels where there are such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.models import stacking
from ensemble.ops import lowering, serial
from ensemble.passes.aten import graph_of
from ensemble.passes.moving import join_moves
from ensemble.passes.operators import with_operators
from ensemble.strategies.built import Built
from ensemble.strategies.compiled import as_one_graph


def vmap(models: Sequence[nn.Module], example: Tensor) -> Built:
    """One vmapped forward over the stacked state, lowered to what depends on the image."""
    lowered = lower_vmap(models, example)
    kinds = Counter(operation.kind.label for operation in lowered.operations)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
    note = f"kernels: {counts}" if counts else "kernels: none, all by torch's own"
    return Built(
        lambda x: lowered.forward(serial.contiguous(x)), "; ".join((note, *lowered.refused))
    )


def compiled(models: Sequence[nn.Module], example: Tensor) -> Built:
    """The same through `torch.compile`: for where the operators are made of torch's own."""
    forward = as_one_graph(lower_vmap(models, example).forward)
    return Built(lambda x: forward(x.contiguous()))


def lower_vmap(models: Sequence[nn.Module], example: Tensor) -> lowering.Lowered:
    """The vmapped forward of the models by the operators of `ensemble.ops`, lowered."""
    stacking.check_alike(models)
    per_model = example.dim() == 5
    graph, names = graph_of(models[0], example[0] if per_model else example)
    join_moves(graph)
    with_operators(graph)
    in_dims = (*[0] * len(names), 0 if per_model else None)
    mapped = torch.vmap(graph, in_dims=in_dims)
    stacked = stacking.stacked_state(models)
    state = {name: stacked[name] for name in names}
    del stacked  # the state is freed tensor by tensor, as it is packed
    # A trace holds for inputs that lie in memory as its example does.
    return lowering.lower(mapped, state, example.contiguous(), threads=torch.get_num_threads())
