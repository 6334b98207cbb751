"""The kernels of programs: what each can run, costs and packs, and how all are run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble.compiler.kernels.direct import is_planar
from ensemble.compiler.kernels.kernel import LOCAL, STEP, fill_geometry
from ensemble.compiler.kernels.registry import KERNELS
from ensemble.compiler.kernels.run import (
    STOP,
    load,
    mark_large,
    new_state,
    run,
)
from ensemble.compiler.kernels.select import select_table, selected
from ensemble.compiler.planning.operation import Geometry, Kind
from ensemble.compiler.runtime.huge_pages import in_large_pages

__all__ = [
    "KERNELS",
    "LOCAL",
    "STEP",
    "STOP",
    "can_run",
    "choose",
    "empty_packed",
    "fill_geometry",
    "is_planar",
    "load",
    "mark_large",
    "new_state",
    "pack",
    "run",
    "scratch_bytes",
    "select_table",
    "selected",
    "unpack",
]


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
    like, fill = empty_packed(weight, kind), KERNELS[kind].pack
    packed = in_large_pages(like.nbytes).view(like.dtype).view(like.shape)
    assert fill is not None, kind
    for source, target in zip(weight, packed, strict=True):
        fill(source, target)
    return packed


def unpack(packed: Tensor, kind: Kind, shape: Sequence[int]) -> Tensor:
    """What `pack` was given, `shape`: `(N, K, C, R, S)`, in float32: as exact as what it made."""
    unpack_one = KERNELS[kind].unpack
    assert unpack_one is not None, kind
    return torch.stack([unpack_one(model, shape[1:]) for model in packed])


def scratch_bytes(kind: Kind, geometry: Geometry) -> int:
    """What a step needs beside its operands, at most."""
    return KERNELS[kind].scratch_bytes(geometry)
