"""The time of a call against ranks, on paper: compute, one broadcast, one gather. No torch.

After Hockney's model of a message, latency plus bytes over bandwidth (Parallel Computing 20, 1994).
A broadcast is a tree, as gloo and NCCL do it; a gather ends at one rank, which takes a part of each
other. The slowest rank decides: of R forwards, each of which varies, the mean of the longest.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CLASSES, CHANNELS, PX, FLOAT_BYTES = 1000, 3, 224, 4
MOST_RANKS = 2**20
DRAWS = 2000  # of the longest of R forwards


@dataclass(frozen=True)
class Constants:
    """What was measured, see `constants.py`."""

    model_s: float  # one forward of one model, its weights read from memory
    spread: float  # deviation of the logarithm of a forward's time
    step_s: float  # a message of no size
    part_s: float  # one more message of no size, where many come in at one rank
    bytes_per_s: float


@dataclass(frozen=True)
class Call:
    """Seconds of one call, and what they consist of."""

    compute_s: float
    waiting_s: float  # for the slowest of all ranks, beyond a mean forward
    broadcast_s: float
    gather_s: float

    @property
    def whole_s(self) -> float:
        return self.compute_s + self.waiting_s + self.communication_s

    @property
    def communication_s(self) -> float:
        return self.broadcast_s + self.gather_s

    @property
    def communication(self) -> float:
        """Its share of the call."""
        return self.communication_s / self.whole_s


def call(constants: Constants, *, models: int, ranks: int, batch: int = 1, px: int = PX) -> Call:
    """One call of shared inputs, whose logits are gathered."""
    compute_s = math.ceil(models / ranks) * batch * constants.model_s
    if ranks == 1:
        return Call(compute_s, 0.0, 0.0, 0.0)
    image = batch * CHANNELS * px * px * FLOAT_BYTES
    steps = math.ceil(math.log2(ranks))
    received = (models - math.ceil(models / ranks)) * batch * CLASSES * FLOAT_BYTES
    return Call(
        compute_s=compute_s,
        waiting_s=compute_s * _longest(constants.spread, ranks),
        broadcast_s=steps * (constants.step_s + image / constants.bytes_per_s),
        gather_s=constants.step_s
        + (ranks - 2) * constants.part_s
        + received / constants.bytes_per_s,
    )


def ranks_for(constants: Constants, *, share: float, models_per_rank: int) -> int | None:
    """The fewest ranks at which communication takes `share` of a call; None where it does not up
    to `MOST_RANKS`."""

    def is_reached(ranks: int) -> bool:
        found = call(constants, models=models_per_rank * ranks, ranks=ranks)
        return found.communication >= share

    candidates = range(2, MOST_RANKS + 1)
    index = bisect_left(candidates, True, key=is_reached)  # it grows with the ranks
    return candidates[index] if index < len(candidates) else None


def _longest(spread: float, ranks: int) -> float:
    """By how much of a mean forward the longest of R is longer: drawn, with a fixed seed.

    The longest of R uniform numbers is the R-th root of one, and a normal number of it.
    """
    quantiles = np.random.default_rng(0).random(DRAWS) ** (1 / ranks)
    normal = NormalDist()
    longest = [
        math.exp(spread * normal.inv_cdf(min(quantile, 1 - 1e-12))) for quantile in quantiles
    ]
    return max(0.0, float(np.mean(longest)) / math.exp(spread**2 / 2) - 1)
