"""How the input of a call reaches the ranks, and how their logits become what is served."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.sharding import windows
from ensemble.strategies.reduction import probabilities


class Exchange:
    """What moves in the calls of one row.

    Args:
        blocks: the models of each rank.
        shape: of the input: `(B, 3, H, W)`, or `(N, B, 3, H, W)` for per-model inputs.
        dtype: of the input.
    """

    def __init__(
        self, group: Group, blocks: tuple[range, ...], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self._group, self._blocks, self._shape, self._dtype = group, blocks, shape, dtype
        self._most, self._own = max(map(len, blocks)), blocks[group.rank]

    @cached_property
    def _inbox(self) -> Tensor:
        """Where the input is received: one place, so that no call waits for fresh memory."""
        per_model = len(self._shape) == 5
        shape = (self._most, *self._shape[1:]) if per_model else self._shape
        return torch.empty(shape, dtype=self._dtype, device=self._group.device)

    def spread(self, x: Tensor | None) -> Tensor:
        """This rank's part of an input that rank 0 alone has: all of it, or its models' batches."""
        if len(self._shape) == 4:
            received = self._inbox if x is None else x.contiguous()
            self._group.broadcast(received)
            return received
        places = windows(self._blocks)
        whole = None if x is None else x.contiguous()
        parts = None if whole is None else [whole[at.start : at.stop] for at in places]
        self._group.scatter(self._inbox, parts)
        offset = self._own.start - places[self._group.rank].start
        return self._inbox[offset : offset + len(self._own)]

    def served(self, logits: Tensor, reduce: str) -> Tensor | None:
        """On rank 0 the logits `(N, B, classes)` of all models in their order, elsewhere None; for
        `mean` the mean of their probabilities `(B, classes)`, on all ranks."""
        if reduce == "none":
            return self._gathered(logits)
        total = probabilities(logits, reduce).sum(0)
        self._group.add(total)
        return total / self._blocks[-1].stop

    def _gathered(self, logits: Tensor) -> Tensor | None:
        sent = logits.contiguous()
        if len(sent) < self._most:
            sent = sent.new_zeros(self._most, *sent.shape[1:])
            sent[: len(logits)] = logits
        if self._group.rank:
            self._group.gather(sent, None)
            return None
        parts = sent.new_empty(len(self._blocks), *sent.shape)
        self._group.gather(sent, list(parts))
        if all(len(block) == self._most for block in self._blocks):
            return parts.flatten(0, 1)
        pieces = zip(parts, self._blocks, strict=True)
        return torch.cat([part[: len(block)] for part, block in pieces])
