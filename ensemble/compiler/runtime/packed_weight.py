"""A weight that oneDNN packs for a convolution, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedWeight:
    """A weight, packed or dense; arguments of its packing: padding, stride, dilation, groups, input
    size."""

    weight: Tensor
    arguments: tuple[Any, ...]

    def dense(self) -> Tensor:
        """The weight in memory order."""
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def pack(self) -> Tensor:
        """The weight in oneDNN's blocked layout, which is opaque."""
        if self.weight.is_mkldnn:
            return self.weight
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the size
        packed: Tensor = reorder(self.weight.to_mkldnn(), *self.arguments)
        return packed
