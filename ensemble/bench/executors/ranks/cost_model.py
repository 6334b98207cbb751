"""A cost model of a call over ranks: compute, one broadcast, one gather. No torch.

A message costs latency + bytes / bandwidth (Hockney, Parallel Computing 20, 1994). A broadcast is a
tree, as in gloo and NCCL; at the end of a gather one rank receives a part from each other. The
slowest rank determines the call: the expected maximum of R log-normal forwards.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CLASSES, CHANNELS, PX, FLOAT_BYTES = 1000, 3, 224, 4
MAX_RANKS = 2**20
SAMPLES = 2000  # of the maximum of R forwards


@dataclass(frozen=True)
class Constants:
    """Measured by `calibration.py`."""

    model_s: float  # a forward of one model, its weights not in cache
    spread: float  # standard deviation of the log of a forward's time
    step_s: float  # latency of an empty message
    part_s: float  # each further empty message to the same rank
    bytes_per_s: float


@dataclass(frozen=True)
class CallCost:
    """The predicted time of a call and its parts, in seconds."""

    compute_s: float
    waiting_s: float  # for the slowest rank, beyond a mean forward
    broadcast_s: float
    gather_s: float

    @property
    def whole_s(self) -> float:
        return self.compute_s + self.waiting_s + self.communication_s

    @property
    def communication_s(self) -> float:
        return self.broadcast_s + self.gather_s

    @property
    def communication_share(self) -> float:
        """The share of communication in the call."""
        return self.communication_s / self.whole_s


def call_cost(
    constants: Constants, *, models: int, ranks: int, batch: int = 1, px: int = PX
) -> CallCost:
    """The cost of a call with shared inputs and gathered logits."""
    compute_s = math.ceil(models / ranks) * batch * constants.model_s
    if ranks == 1:
        return CallCost(compute_s, 0.0, 0.0, 0.0)
    image = batch * CHANNELS * px * px * FLOAT_BYTES
    steps = math.ceil(math.log2(ranks))
    received = (models - math.ceil(models / ranks)) * batch * CLASSES * FLOAT_BYTES
    return CallCost(
        compute_s=compute_s,
        waiting_s=compute_s * _straggler_overhead(constants.spread, ranks),
        broadcast_s=steps * (constants.step_s + image / constants.bytes_per_s),
        gather_s=constants.step_s
        + (ranks - 2) * constants.part_s
        + received / constants.bytes_per_s,
    )


def ranks_at_share(constants: Constants, *, share: float, models_per_rank: int) -> int | None:
    """The fewest ranks at which communication takes `share` of a call; None if there are none up to
    `MAX_RANKS`."""

    def is_reached(ranks: int) -> bool:
        cost = call_cost(constants, models=models_per_rank * ranks, ranks=ranks)
        return cost.communication_share >= share

    candidates = range(2, MAX_RANKS + 1)
    index = bisect_left(candidates, True, key=is_reached)  # the share grows with the ranks
    return candidates[index] if index < len(candidates) else None


def _straggler_overhead(spread: float, ranks: int) -> float:
    """How much longer the slowest of R forwards is, relative to the mean: Monte Carlo, fixed seed.

    The maximum of R uniform numbers is distributed as the R-th root of one (inverse transform).
    """
    quantiles = np.random.default_rng(0).random(SAMPLES) ** (1 / ranks)
    normal = NormalDist()
    maxima = [math.exp(spread * normal.inv_cdf(min(quantile, 1 - 1e-12))) for quantile in quantiles]
    return max(0.0, float(np.mean(maxima)) / math.exp(spread**2 / 2) - 1)
