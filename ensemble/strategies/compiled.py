"""`torch.compile` of the loop and of the vmapped forward.

Nothing may fall back silently: `fullgraph` turns a graph break, and dynamo's recompile limit, into
an error, and the benchmark lets no call after the first recompile.

Weights are inputs of the graphs and not frozen into them. Freezing compiles every model anew, 3 to
4 s each, against 4 s for all of them, and gave 1.25 of the eager loop against 1.22 (N=4, 224 px).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.models import stacking
from ensemble.models.stacking import stacked_state
from ensemble.passes.folding import channels_last, folded
from ensemble.strategies import eager
from ensemble.strategies.built import Built


def loop(models: Sequence[nn.Module], example: Tensor) -> Built:
    """One compiled forward, called for each folded model with that model's weights."""
    built = eager.loop(compiled_models(folded(models)), example)
    return Built(lambda x: built.forward(channels_last(x)))


def vmap(models: Sequence[nn.Module], example: Tensor) -> Built:
    """The vmapped forward of the folded models as one graph; `torch.compile` is outermost.

    dynamo does not trace functorch's stateless module: `torch.func.functional_call` stands for it.
    """
    copies = folded(models)
    mapped = torch.vmap(
        stacking.stateless(copies[0]), in_dims=(0, 0 if example.dim() == 5 else None)
    )
    compiled, state = torch.compile(mapped, fullgraph=True, dynamic=False), stacked_state(copies)
    return Built(lambda x: compiled(state, channels_last(x)))


def compiled_models(models: Sequence[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """Each model as a call of one and the same graph, with that model's weights."""
    one = torch.compile(stacking.stateless(models[0]), fullgraph=True, dynamic=False)
    return [partial(one, stacking.named_tensors(model)) for model in models]
