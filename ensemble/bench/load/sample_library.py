"""The sample library (LoadGen's QSL): LoadGen draws an index, this maps it to image and tenant."""

from __future__ import annotations

from collections.abc import Sequence

MIN_SAMPLES = 4096  # with several tenants: a tenant's share of the samples is its share of requests


def tenant_shares(num_tenants: int, skew: float) -> tuple[float, ...]:
    """Each tenant's share of the requests: uniform, or by Zipf's law 1, 2**-skew, 3**-skew, ..."""
    weights = [(tenant + 1) ** -skew for tenant in range(num_tenants)]
    return tuple(weight / sum(weights) for weight in weights)


def sample_library(images: int, shares: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """(image, tenant) of each sample; LoadGen draws samples uniformly.

    A single tenant has each image once. Of several, each has at least one sample, and its share of
    the samples to within one in `MIN_SAMPLES`.
    """
    if len(shares) == 1:
        return tuple((image, 0) for image in range(images))
    samples = max(MIN_SAMPLES, 16 * len(shares))
    tenants = [
        tenant for tenant, share in enumerate(shares) for _ in range(max(1, round(share * samples)))
    ]
    return tuple((index % images, tenant) for index, tenant in enumerate(tenants))
