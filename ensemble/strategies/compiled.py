"""`torch.compile` of the loop and of the vmapped forward.

Nothing may fall back silently: `fullgraph` turns a graph break, and dynamo's recompile limit, into
an error, and the benchmark lets no call after the first recompile.

Weights are inputs of the graphs and not frozen into them. Freezing compiles every model anew, 3 to
4 s each, against 4 s for all of them, and gave 1.25 of the eager loop against 1.22 (N=4, 224 px).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported

from ensemble.compiler.graph.batch_norm_folding import folded, private
from ensemble.errors import UnavailableError, first_line
from ensemble.models import stacking
from ensemble.models.stacking import stacked_state
from ensemble.strategies import eager
from ensemble.strategies.build_result import Built


def loop(models: Sequence[nn.Module], example: Tensor) -> Built:
    """One compiled forward, called for each folded model with that model's weights."""
    return eager.loop(compiled_models(folded(models, example)), example, private=private)


def vmap(models: Sequence[nn.Module], example: Tensor) -> Built:
    """The vmapped forward of the folded models as one graph; `torch.compile` is outermost.

    dynamo does not trace functorch's stateless module: `torch.func.functional_call` stands for it.
    """
    copies = folded(models, example)
    mapped = torch.vmap(
        stacking.stateless(copies[0]),
        in_dims=(0, 0 if example.dim() == 5 else None),
        randomness="different",
    )
    compiled, state = as_one_graph(mapped), stacked_state(copies)
    return Built(lambda x: compiled(state, private(x)))


def as_one_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through `torch.compile`, which its first call does.

    What dynamo cannot trace as one graph, and what the compiler cannot do, is said by that call as
    a refusal: Inductor fails, for one, on some nets with adaptive poolings under vmap.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> Tensor:
        try:
            return compiled(*arguments)
        except BackendCompilerFailed as error:
            reason = first_line(error.inner_exception)
            raise UnavailableError(f"torch.compile cannot compile this model: {reason}") from error
        except Unsupported as error:
            reason = first_line(error)
            raise UnavailableError(f"torch.compile cannot trace this model: {reason}") from error

    return call


def compiled_models(models: Sequence[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """Each model as a call of one and the same graph, with that model's weights."""
    one = as_one_graph(stacking.stateless(models[0]))
    return [partial(one, stacking.named_tensors(model)) for model in models]
