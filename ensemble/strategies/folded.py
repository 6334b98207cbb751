"""Loop and vmap with batch norm folded into convolutions, by default with channels-last tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph import batch_norm_folding
from ensemble.models import stacking
from ensemble.strategies import eager, saved_run
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.contexts import ieee_products
from ensemble.strategies.saved_run import EACH, SavedRun
from ensemble.strategies.serving import Commit, Serving, exchange_tensors, tensors_of


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
        return replace(eager.loop(copies, example), serving=serving_of(copies))
    built = eager.loop(copies, example, private=batch_norm_folding.private)
    return replace(built, serving=serving_of(copies, saved=saved_as(copies, EACH)))


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
    private: Callable[[Tensor], Tensor] = batch_norm_folding.private
    if memory_format == torch.contiguous_format:
        _make_contiguous(copies)
        private = torch.clone
    built = eager.vmap(copies, example, private=private, is_own_stack=True)
    assert built.serving is not None
    exchange = built.serving.stage

    def stage(index: int, model: nn.Module, example: Tensor) -> Commit:
        return exchange(index, _folded_one(model, index, example), example)

    return replace(built, serving=replace(built.serving, stage=stage))


def serving_of(copies: Sequence[nn.Module], **options: Any) -> Serving:
    """The serving of a strategy that runs folded copies, or the stack that they are slices of.

    options: of `Serving`.
    """

    def stage(index: int, model: nn.Module, example: Tensor) -> Commit:
        return exchange_tensors(copies[index], _folded_one(model, index, example))

    return Serving(weights=lambda: tensors_of(copies), stage=stage, **options)


def saved_as(copies: Sequence[nn.Module], mode: str) -> Callable[..., SavedRun]:
    """What is saved of folded copies, which are called with channels-last images."""
    return lambda _, __, x: saved_run.of_modules(copies, batch_norm_folding.private(x), mode)


def _folded_one(model: nn.Module, index: int, example: Tensor) -> nn.Module:
    x = example[index : index + 1] if example.dim() == 5 else example
    return folded_models([model], x)[0]


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
