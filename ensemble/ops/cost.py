"""Which kernel a convolution of N models takes: a rule of its shapes alone. Imports no torch."""

from ensemble.ops.operation import DIRECT, DIRECT_PAIRS, WINOGRAD_2, WINOGRAD_4, Geometry

# Multiply-adds that a core does while it reads one byte of weights from memory (here 57 G a second
# against 14 GB): a model's weights are read once a call, and no cache holds those of N models.
PER_WEIGHT_BYTE = 4
# Multiply-adds in whose time one float of a patch or of a tile's products is transformed.
PER_TRANSFORMED = 6


def choose(geometry: Geometry, *, pairs: bool) -> int:
    """The kernel with the least estimated time; `pairs`: may it multiply pairs of bfloat16?"""
    kinds = [DIRECT_PAIRS if pairs else DIRECT]
    if geometry.kernel == (3, 3) and geometry.stride == geometry.dilation == (1, 1):
        kinds += [WINOGRAD_2, WINOGRAD_4]
    return min(kinds, key=lambda kind: estimate(geometry, kind))


def estimate(geometry: Geometry, kind: int) -> float:
    """The time of one model's convolution on one core, in multiply-adds."""
    height, width = geometry.out_size
    filters = geometry.channels * geometry.out_channels
    if kind in (DIRECT, DIRECT_PAIRS):
        at_once = 2 if kind == DIRECT_PAIRS else 1
        taps = geometry.kernel[0] * geometry.kernel[1]
        products = geometry.images * height * width * taps * filters // at_once
        transforms, weight_bytes = 0, 4 * taps * filters // at_once
    else:
        planes = (kind + 2) ** 2
        tiles = geometry.images * -(-height // kind) * -(-width // kind)
        products, weight_bytes = tiles * planes * filters, 4 * planes * filters
        transforms = tiles * planes * (geometry.channels + geometry.out_channels)
    return max(products, weight_bytes * PER_WEIGHT_BYTE) + transforms * PER_TRANSFORMED
