"""`torch.compile` of the loop and of the vmapped forward.

Nothing may fall back silently: `fullgraph` turns a graph break, and dynamo's recompile limit, into
an error, and the benchmark lets no call after the first recompile.

Weights are inputs of the graphs and not frozen into them. Freezing compiles every model anew, 3 to
4 s each, against 4 s for all of them, and gave 1.25 of the eager loop against 1.22 (N=4, 224 px).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemble import stacking
from ensemble.folding import channels_last, folded
from ensemble.stacking import stacked_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from ensemble.strategies import Forward


def loop(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """One compiled forward, called for each folded model with that model's weights."""
    copies = folded(models)
    one, states = compiled_model(copies[0]), [stacking.named_tensors(copy) for copy in copies]
    if example.dim() == 5:
        return lambda x: torch.stack(
            [one(state, own) for state, own in zip(states, channels_last(x), strict=True)]
        )

    def forward(x: Tensor) -> Tensor:
        x = channels_last(x)
        return torch.stack([one(state, x) for state in states])

    return forward


def vmap(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """The vmapped forward of the folded models as one graph; `torch.compile` is outermost.

    dynamo does not trace functorch's stateless module: `torch.func.functional_call` stands for it.
    """
    copies = folded(models)
    mapped = torch.vmap(
        stacking.stateless(copies[0]), in_dims=(0, 0 if example.dim() == 5 else None)
    )
    compiled, state = torch.compile(mapped, fullgraph=True, dynamic=False), stacked_state(copies)
    return lambda x: compiled(state, channels_last(x))


def compiled_model(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """`f(state, x) -> logits` for any state of the structure of `model`: one graph for N models."""
    return torch.compile(stacking.stateless(model), fullgraph=True, dynamic=False)
