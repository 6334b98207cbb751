"""Tests of the machine code of the Triton kernels, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from math import inf

import pytest

from ensemble.compiler.cuda.tiles import candidate_tiles, default_tile
from tests.compiler.cuda.compile_for import LIMITS, Usage, compiled
from tests.compiler.cuda.layers import OTHERS, RESNET18, Layer

FORMATS = {
    "bfloat16": ("bfloat16", "ieee"),
    "float16": ("float16", "ieee"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "ieee": ("float32", "ieee"),
}
# ptxas spills a few addresses where it prefers more programs per multiprocessor.
FEW_BYTES = 64
# Triton 3.6 replaces descriptors by a block of pointers where there is no TMA, and spills hundreds
# of bytes.
TRITON = tuple(map(int, version("triton").split(".")[:2]))


def launches_of(layers: Iterable[str], number_format: str, capability: int) -> list[Layer]:
    """The launches of layers, in the default tile of a device."""
    dtype, precision = FORMATS[number_format]
    found = []
    for name in layers:
        layer = replace({**RESNET18, **OTHERS}[name], dtype=dtype, precision=precision)
        tile = default_tile(layer.problem(), LIMITS[capability])
        found.append(replace(layer, tile=tile.fields))
    return found


def check(launches: list[Layer], capability: int) -> None:
    """All fit the shared memory and the registers, and use the tensor cores and TMA."""
    for launch, kernels in zip(launches, compiled(launches, capability), strict=True):
        names = [kernel.kernel for kernel in kernels]
        splits = launch.tile[-1]
        assert names == ["implicit_gemm", "sum_splits"][: 2 if splits > 1 else 1]
        for kernel in kernels:
            assert kernel.shared_bytes <= LIMITS[capability].shared_bytes, (launch, kernel)
            assert kernel.stack_bytes <= _allowed_stack(launch, capability), (launch, kernel)
        _check_instructions(launch, kernels[0], capability)


def _allowed_stack(launch: Layer, capability: int) -> float:
    """The bytes of spilled registers that are allowed."""
    if capability < 90 and TRITON < (3, 8):
        return inf
    return FEW_BYTES if launch.dtype == "float32" else 0


def _check_instructions(launch: Layer, kernel: Usage, capability: int) -> None:
    is_wide = launch.tile[0] >= 64  # a warpgroup multiplies 64 rows
    uses_tensor_cores = launch.precision != "ieee" or launch.dtype != "float32"
    assert kernel.wgmma == (capability >= 90 and is_wide and uses_tensor_cores), (launch, kernel)
    assert (kernel.wgmma or kernel.mma) == uses_tensor_cores, (launch, kernel)
    assert kernel.tma == (capability >= 90), (launch, kernel)


@pytest.mark.parametrize("number_format", ["bfloat16", "tf32x3"])
def test_the_layers_of_a_resnet_compile_for_an_h100(number_format: str) -> None:
    check(launches_of(["conv1", "stage 2, shortcut", "stage 4"], number_format, 90), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number_format", list(FORMATS))
def test_every_tile_that_the_autotuner_may_pick_compiles(
    number_format: str, capability: int
) -> None:
    launches = [
        replace(launch, tile=tile.fields)
        for launch in launches_of([*RESNET18, *OTHERS], number_format, capability)
        for tile in candidate_tiles(launch.problem(), LIMITS[capability])
    ]
    check(launches, capability)
