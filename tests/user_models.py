"""Functions that give models, as users have them: their file is named on the command line."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Output = namedtuple("Output", ["logits", "features"])
CLASSES = 7
VALUE = 4


@dataclass
class Width:  # with postponed annotations: dataclasses looks for the module while it is imported
    channels: int = 8


class Classifier(nn.Module):
    """`(B, channels, H, W)` -> `(B, 7)`; with a lambda, a tensor that is neither parameter nor
    buffer, and a buffer that is not in its state dict: none of them survives pickle or "meta"."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, Width().channels, 3, stride=2)
        self.bn = nn.BatchNorm2d(Width().channels)
        self.head = nn.Linear(Width().channels, CLASSES)
        self.activation: Callable[[Tensor], Tensor] = lambda x: x.relu()
        self.scale = torch.tensor(3.0)
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn(self.conv(x)) * self.scale + self.shift)
        return self.head(x.mean((2, 3)))


class Segmenter(nn.Module):
    """`(B, 3, H, W)` -> `(B, 4, H, W)`"""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(x).relu())


class Embedder(nn.Module):
    """`(B, 3, H, W)` -> `(B, 8)`, which are no classes: the last layer normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).mean((2, 3))


class Regressor(Embedder):
    """`(B, 3, H, W)` -> `(B,)`"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class Several(nn.Module):
    """`(B, 3, H, W)` -> logits `(B, 7)` and features, as a named tuple, a dict or a list."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.head, self.kind = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES), kind

    def forward(self, x: Tensor) -> object:
        features = self.conv(x).relu().mean((2, 3))
        found = Output(self.head(features), features)
        kinds = {"tuple": found, "dict": found._asdict(), "list": [list(found), features.mean()]}
        return kinds[self.kind]


def gray() -> nn.Module:
    return Classifier()


def many_channels() -> nn.Module:
    return Classifier(13)


def segmenter() -> nn.Module:
    return Segmenter().train().double()


def named_tuple() -> nn.Module:
    return Several("tuple")


def local_class() -> nn.Module:
    class Local(Segmenter):
        """Pickle does not find it."""

    return Local()


def needs_arguments(width: int, depth: int, bias: bool = True) -> nn.Module:
    return nn.Conv2d(width, depth, 1, bias=bias)


def raises() -> nn.Module:
    raise KeyError("no weights here")


def gives_a_number() -> int:
    return VALUE


def is_lazy() -> nn.Module:
    return nn.LazyConv2d(4, 3)


_CALLS: list[int] = []


def differs_in_each_call() -> nn.Module:
    _CALLS.append(0)
    return nn.Conv2d(3, len(_CALLS), 1)
