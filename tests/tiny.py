"""A tiny BatchNorm network and its ensembles: what a ResNet has, in a millisecond."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """(B, 3, H, W) -> (B, 5): convolution, batch norm with its own statistics, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.fc((x + x.roll(1, 1)).mean((2, 3)))


def tiny_models(count: int) -> list[nn.Module]:
    """Models with different weights and different batch statistics."""
    models: list[nn.Module] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model = TinyNet().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
        model.bn.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
        model.bn.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
        models.append(model)
    return models


def independent(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What each model alone makes of its own input, without any code of `ensemble`."""
    inputs = x if x.dim() == 5 else [x] * len(models)
    with torch.no_grad():
        return torch.stack([model(batch) for model, batch in zip(models, inputs, strict=True)])
