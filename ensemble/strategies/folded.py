"""Loop and vmap with batch norm folded into convolutions, by default with channels-last tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding
from ensemble.models import stacking
from ensemble.strategies import eager
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.forward import ieee_products


def loop(
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    memory_format: torch.memory_format = torch.channels_last,
) -> BuildResult:
    """`eager.loop` over folded models.

    memory_format: of images and weights, channels-last or contiguous.
    """
    copies = folded_models(models, example)
    if memory_format == torch.contiguous_format:
        _make_contiguous(copies)
        return eager.loop(copies, example)
    return eager.loop(copies, example, private=batch_norm_folding.private)


def vmap(
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    memory_format: torch.memory_format = torch.channels_last,
) -> BuildResult:
    """`eager.vmap` over folded models. On the CPU channels-last suits grouped convolutions best.

    memory_format: as for `loop`.
    """
    copies = folded_for_vmap(models, example)
    if memory_format == torch.contiguous_format:
        _make_contiguous(copies)
        return eager.vmap(copies, example)
    return eager.vmap(copies, example, private=batch_norm_folding.private)


def folded_models(models: Sequence[nn.Module], example: Tensor) -> list[nn.Module]:
    """`batch_norm_folding.folded`, whose checks compare the copies' results with the models'."""
    with ieee_products(example.device):
        return batch_norm_folding.folded(models, example)


def folded_for_vmap(models: Sequence[nn.Module], example: Tensor) -> list[nn.Module]:
    """Channels-last copies with batch norm folded, whose pooling vmap maps without a loop."""
    copies = folded_models(models, example)
    for model in copies:
        use_global_avg_pool(model)
    return copies


def _make_contiguous(copies: Sequence[nn.Module]) -> None:
    for model in copies:
        tensors = stacking.named_tensors(model)
        stacking.set_tensors(model, {name: t.contiguous() for name, t in tensors.items()})


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
