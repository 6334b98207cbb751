"""The communication of a call: input to the ranks, logits or their mean to rank 0."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.sharding import equal_ranges
from ensemble.models.outputs import is_class_logits
from ensemble.strategies.reduction import summands


class Exchange:
    """The communication of the calls of one row.

    Args:
        shards: the models of each rank.
        shape: of the input: `(B, channels, H, W)`, or `(N, B, channels, H, W)` where per model.
        dtype: of the input.
    """

    def __init__(
        self, group: Group, shards: tuple[range, ...], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self._group, self._shards, self._shape, self._dtype = group, shards, shape, dtype
        self._largest, self._own = max(map(len, shards)), shards[group.rank]

    @cached_property
    def _input_buffer(self) -> Tensor:
        """The receive buffer, reused so that no call allocates memory."""
        per_model = len(self._shape) == 5
        shape = (self._largest, *self._shape[1:]) if per_model else self._shape
        return torch.empty(shape, dtype=self._dtype, device=self._group.device)

    def distribute(self, x: Tensor | None) -> Tensor:
        """This rank's part of rank 0's input: all of it, or the batches of its models."""
        if len(self._shape) == 4:
            received = self._input_buffer if x is None else x.contiguous()
            self._group.broadcast(received)
            return received
        ranges = equal_ranges(self._shards)
        whole = None if x is None else x.contiguous()
        parts = None if whole is None else [whole[at.start : at.stop] for at in ranges]
        self._group.scatter(self._input_buffer, parts)
        offset = self._own.start - ranges[self._group.rank].start
        return self._input_buffer[offset : offset + len(self._own)]

    def combine(self, logits: Tensor, reduce: str, *, classes: int | None) -> Tensor | None:
        """The logits `(N, B, classes)` of all models on rank 0, None elsewhere; for `mean` their
        mean over the models, see `strategies.reduction`, on all ranks.

        classes: the number of classes of the models, None if they are no classifiers.
        """
        if reduce == "none":
            return self._gather(logits)
        has_classes = is_class_logits(logits, classes)
        total = summands(logits, reduce, has_classes=has_classes).sum(0)
        self._group.all_reduce(total)
        return total / self._shards[-1].stop

    def _gather(self, logits: Tensor) -> Tensor | None:
        sent = logits.contiguous()
        if len(sent) < self._largest:
            sent = sent.new_zeros(self._largest, *sent.shape[1:])
            sent[: len(logits)] = logits
        if self._group.rank:
            self._group.gather(sent, None)
            return None
        parts = sent.new_empty(len(self._shards), *sent.shape)
        self._group.gather(sent, list(parts))
        if all(len(shard) == self._largest for shard in self._shards):
            return parts.flatten(0, 1)
        pieces = zip(parts, self._shards, strict=True)
        return torch.cat([part[: len(shard)] for part, shard in pieces])
