"""The kernels: what each can run, what it costs, how its weights are packed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble.compiler.kernels.direct import is_nchw
from ensemble.compiler.kernels.gather import index_table, indices_of
from ensemble.compiler.kernels.kernel import IN_ARENA, STEP_DTYPE, fill_geometry
from ensemble.compiler.kernels.registry import KERNELS
from ensemble.compiler.planning.step import Geometry, Kind
from ensemble.compiler.runtime.huge_pages import allocate_huge

__all__ = [
    "IN_ARENA",
    "KERNELS",
    "STEP_DTYPE",
    "can_run",
    "choose",
    "empty_packed",
    "fill_geometry",
    "index_table",
    "indices_of",
    "is_nchw",
    "load",
    "pack",
    "scratch_bytes",
    "unpack",
]


def load() -> None:
    """Compile all kernels, or read them from numba's cache on disk."""
    from ensemble.compiler.runtime import entry_points  # it imports the kernels

    entry_points.load()


def can_run(kind: Kind, geometry: Geometry) -> bool:
    """Can the kernel run a step of this geometry?"""
    return KERNELS[kind].can_run(geometry)


def choose(geometry: Geometry, kinds: Sequence[Kind]) -> Kind:
    """The cost model's choice: the kernel with the least estimated time of `kinds`, which can all
    run it."""
    return min(kinds, key=lambda kind: estimate(geometry, kind))


def estimate(geometry: Geometry, kind: Kind) -> float:
    """The estimated time of one model's convolution on one core, in multiply-adds."""
    cost = KERNELS[kind].cost
    assert cost is not None, kind
    return cost(geometry)


def empty_packed(weight: Tensor, kind: Kind) -> Tensor:
    """An uninitialized stack for the packed weights of N models, `(N, K, C, R, S)`."""
    empty = KERNELS[kind].empty
    assert empty is not None, kind
    return empty(weight)


def pack(weight: Tensor, kind: Kind) -> Tensor:
    """The weights of N models, `(N, K, C, R, S)`, in the kernel's layout, in huge pages."""
    like, pack_one = empty_packed(weight, kind), KERNELS[kind].pack
    packed = allocate_huge(like.nbytes).view(like.dtype).view(like.shape)
    assert pack_one is not None, kind
    for source, target in zip(weight, packed, strict=True):
        pack_one(source, target)
    return packed


def unpack(packed: Tensor, kind: Kind, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`, `shape`: `(N, K, C, R, S)`, in float32, as exact as packing was."""
    unpack_one = KERNELS[kind].unpack
    assert unpack_one is not None, kind
    return torch.stack([unpack_one(model, shape[1:]) for model in packed])


def scratch_bytes(kind: Kind, geometry: Geometry) -> int:
    """An upper bound of the scratch memory of a step."""
    return KERNELS[kind].scratch_bytes(geometry)
