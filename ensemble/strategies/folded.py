"""Loop and vmap with batch norm folded into convolutions, and channels-last activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding
from ensemble.strategies import eager
from ensemble.strategies.build_result import BuildResult


def loop(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """`eager.loop` over folded models."""
    return eager.loop(
        batch_norm_folding.folded(models, example), example, private=batch_norm_folding.private
    )


def vmap(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """`eager.vmap` over folded models: channels-last suits grouped convolutions best."""
    copies = batch_norm_folding.folded(models, example)
    for model in copies:
        use_global_avg_pool(model)
    return eager.vmap(copies, example, private=batch_norm_folding.private)


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d(1)` for vmap: torch's calls `as_strided_` on channels-last inputs,
    which has no batching rule and falls back to a loop over the models."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True)


def use_global_avg_pool(model: nn.Module) -> None:
    """Replace global average pooling by `GlobalAvgPool2d`, in place: `model` must be a copy."""
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
            module.__class__ = GlobalAvgPool2d
