"""Which kernel a convolution of N models takes: a rule of its shapes alone. Imports no torch."""

from collections.abc import Sequence

from ensemble.ops.operation import Geometry, Kind

# Multiply-adds that a core does while it reads one byte of weights from memory (here 57 G a second
# against 14 GB): a model's weights are read once a call, and no cache holds those of N models.
PER_WEIGHT_BYTE = 4
# Multiply-adds in whose time one float of a patch or of a tile's products is transformed.
PER_TRANSFORMED = 6


def choose(geometry: Geometry, kinds: Sequence[Kind]) -> Kind:
    """The kernel with the least estimated time out of `kinds`, those that can run it."""
    return min(kinds, key=lambda kind: estimate(geometry, kind))


def estimate(geometry: Geometry, kind: Kind) -> float:
    """The time of one model's convolution on one core, in multiply-adds."""
    height, width = geometry.out_size
    filters = geometry.channels * geometry.out_channels
    if not kind.tile:
        at_once = 2 if kind == Kind.DIRECT_PAIRS else 1
        taps = geometry.kernel[0] * geometry.kernel[1]
        products = geometry.images * height * width * taps * filters // at_once
        transforms, weight_bytes = 0, 4 * taps * filters // at_once
    else:
        planes = (kind.tile + 2) ** 2
        tiles = geometry.images * -(-height // kind.tile) * -(-width // kind.tile)
        products, weight_bytes = tiles * planes * filters, 4 * planes * filters
        transforms = tiles * planes * (geometry.channels + geometry.out_channels)
    return max(products, weight_bytes * PER_WEIGHT_BYTE) + transforms * PER_TRANSFORMED
