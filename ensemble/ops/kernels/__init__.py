"""The kernels: one file each, with all that belongs to it. A new one is a file and a line here."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ensemble.ops import operation, simd
from ensemble.ops.kernels.direct import DIRECT, DIRECT_PAIRS, is_planar
from ensemble.ops.kernels.head import HEAD
from ensemble.ops.kernels.kernel import LOCAL, STEP, fill_geometry
from ensemble.ops.kernels.pooling import MAX_POOL
from ensemble.ops.kernels.run import ARRIVALS, STOP, make_run
from ensemble.ops.kernels.winograd import WINOGRAD_2, WINOGRAD_4
from ensemble.ops.operation import Geometry, Kind

__all__ = [
    "ARRIVALS",
    "KERNELS",
    "LOCAL",
    "STEP",
    "STOP",
    "can_run",
    "choose",
    "empty_packed",
    "fill_geometry",
    "is_planar",
    "pack",
    "run",
    "scratch_bytes",
]

KERNELS = {
    Kind.DIRECT: DIRECT,
    Kind.DIRECT_PAIRS: DIRECT_PAIRS,
    Kind.WINOGRAD_2: WINOGRAD_2,
    Kind.WINOGRAD_4: WINOGRAD_4,
    Kind.MAX_POOL: MAX_POOL,
    Kind.HEAD: HEAD,
}


def can_run(kind: Kind, geometry: Geometry) -> bool:
    """Can the kernel run such a step?"""
    return KERNELS[kind].can_run(geometry)


def choose(geometry: Geometry, kinds: Sequence[Kind]) -> Kind:
    """The kernel with the least estimated time out of `kinds`, those that can run it."""
    return min(kinds, key=lambda kind: estimate(geometry, kind))


def estimate(geometry: Geometry, kind: Kind) -> float:
    """The time of one model's convolution on one core, in multiply-adds."""
    cost = KERNELS[kind].cost
    assert cost is not None, kind
    return cost(geometry)


def empty_packed(weight: Tensor, kind: Kind) -> Tensor:
    """Room for the weights of N models, `(N, K, C, R, S)`, as the kernel reads them."""
    empty = KERNELS[kind].empty
    assert empty is not None, kind
    return empty(weight)


def pack(weight: Tensor, kind: Kind) -> Tensor:
    """The weights of N models, `(N, K, C, R, S)`, as the kernel reads them."""
    packed, fill = empty_packed(weight, kind), KERNELS[kind].pack
    assert fill is not None, kind
    for own, target in zip(weight, packed, strict=True):
        fill(own, target)
    return packed


def scratch_bytes(kind: Kind, geometry: Geometry) -> int:
    """What a step needs beside its operands, at most."""
    return KERNELS[kind].scratch_bytes(geometry)


# Every file that the code comes from.
_FILES = [Path(str(module.__file__)) for module in (simd, operation)]
_FILES += sorted(Path(__file__).parent.glob("*.py"))
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()
run = make_run(KERNELS, _SOURCES)
