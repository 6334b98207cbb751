"""Loop and vmap with batch norm folded into the convolutions and channels-last activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding
from ensemble.strategies import eager
from ensemble.strategies.build_result import Built


def loop(models: Sequence[nn.Module], example: Tensor) -> Built:
    """`eager.loop` over folded models."""
    return eager.loop(
        batch_norm_folding.folded(models, example), example, private=batch_norm_folding.private
    )


def vmap(models: Sequence[nn.Module], example: Tensor) -> Built:
    """`eager.vmap` over folded models: grouped convolutions like channels-last best."""
    copies = batch_norm_folding.folded(models, example)
    for model in copies:
        use_means(model)
    return eager.vmap(copies, example, private=batch_norm_folding.private)


class MeanOverPixels(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d(1)` for vmap: torch's ends in `as_strided_` on channels-last images,
    which has no batching rule and so becomes a loop over the models."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True)


def use_means(model: nn.Module) -> None:
    """Let the poolings of a model that is a copy be means, where they are."""
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
            module.__class__ = MeanOverPixels
