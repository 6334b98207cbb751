"""What requests ask for: the referee draws a number, this says which image and which model."""

from __future__ import annotations

from collections.abc import Sequence

ENTRIES = 4096  # of tenants; a tenant's share of them is its share of the requests


def shares(lanes: int, skew: float) -> tuple[float, ...]:
    """Each lane's share of the requests: equal, or by Zipf's law 1, 2**-skew, 3**-skew, ..."""
    weights = [(lane + 1) ** -skew for lane in range(lanes)]
    return tuple(weight / sum(weights) for weight in weights)


def library(images: int, of_lanes: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """(image, lane) of each entry; all entries are drawn alike often, by the referee.

    One lane has each image once. Of several each has at least one entry, and its share of them to
    within one in `ENTRIES`.
    """
    if len(of_lanes) == 1:
        return tuple((image, 0) for image in range(images))
    entries = max(ENTRIES, 16 * len(of_lanes))
    lanes = [
        lane for lane, share in enumerate(of_lanes) for _ in range(max(1, round(share * entries)))
    ]
    return tuple((index % images, lane) for index, lane in enumerate(lanes))
