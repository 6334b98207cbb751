"""What the vmap rules of the operators share."""

from collections.abc import Sequence
from typing import Any


def batch_dim_first(tensors: Sequence[Any], in_dims: Sequence[int | None]) -> list[Any]:
    """Each batched tensor with its batch dimension, the models, moved to the front."""
    return [
        tensor.movedim(dim, 0) if dim else tensor
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


def expanded(tensors: Sequence[Any], is_batched: Sequence[bool], num_models: int) -> list[Any]:
    """Each tensor as a stack over the models; a shared one is expanded, not copied."""
    return [
        tensor if batched or tensor is None else tensor.expand(num_models, *tensor.shape)
        for tensor, batched in zip(tensors, is_batched, strict=True)
    ]
