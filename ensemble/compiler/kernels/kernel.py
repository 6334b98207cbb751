"""What a kernel is made of, the table that its steps stand in, and what all kernels use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from ensemble.compiler.codegen.gemm import multiply_rows
from ensemble.compiler.codegen.simd import (
    HAS_BF16_DOT,
    MAX_ROWS,
    PANEL,
    PANEL_VECTORS,
    VECTOR_BYTES,
    WIDTH,
    stand_alone,
)
from ensemble.compiler.planning.operation import Geometry

if TYPE_CHECKING:
    from torch import Tensor

# An operand is an address and the bytes from one model's to the next one's, or LOCAL.
LOCAL = -1  # the stride of an operand that lies in the core's own arena
OPERANDS = ("x", "weight", "bias", "other", "out")
_GEOMETRY = (
    *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
    *("kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x"),
    *("dilation_y", "dilation_x", "share", "out_share"),
)
STEP = np.dtype(
    [(f"{name}{part}", np.int64) for name in OPERANDS for part in ("", "_stride")]
    + [
        (name, np.int64)
        for name in ("kind", "variant", "relu", "function", "option", "real", *_GEOMETRY)
    ]
    + [("number", np.float64)]
)


@dataclass(frozen=True)
class Kernel:
    """One way to compute a step for one model.

    body is compiled by numba: `(step, x, weight, bias, other, out, scratch, part, parts)`, a row of
    `STEP` and addresses, does the share `part` of `parts`. `variant` is for the body alone.
    """

    body: Any
    can_run: Callable[[Geometry], bool]
    scratch_bytes: Callable[[Geometry], int]  # an upper bound of what the body needs
    variant: int = 0
    # Of kernels with weights of `(N, K, C, R, S)`: the empty packed stack, one model packed into
    # it, and one model unpacked to the shape `(K, C, R, S)` that it had.
    empty: Callable[[Tensor], Tensor] | None = None
    pack: Callable[[Tensor, Tensor], None] | None = None
    unpack: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    # In multiply-adds, of one model on one core, for `choose`; every convolution has one.
    cost: Callable[[Geometry], float] | None = None


# Multiply-adds that a core does while it reads one byte of weights from memory (here 57 G a second
# against 14 GB): a model's weights are read once a call, and no cache holds those of N models.
PER_WEIGHT_BYTE = 4
# Multiply-adds in whose time one float of a patch or of a tile's products is transformed.
PER_TRANSFORMED = 6


def cost(*, products: int, weight_bytes: int, transforms: int = 0) -> float:
    """The time of one model's step on one core, in multiply-adds."""
    return max(products, weight_bytes * PER_WEIGHT_BYTE) + transforms * PER_TRANSFORMED


def panels_of(channels: int) -> int:
    """How many panels hold so many channels: weights are packed so, the last one with zeros."""
    return -(-channels // PANEL)


def jit(function: Any) -> Any:
    """Compile by numba, without the interpreter's lock, with C's arithmetic."""
    return njit(nogil=True, error_model="numpy")(function)


def jit_within(function: Any) -> Any:
    """`jit` as part of whoever calls it: LLVM optimises a function again for each caller above it,
    with all that it calls, so that what only hands on to large code costs most of the time."""
    return njit(nogil=True, error_model="numpy", inline="always")(function)


def fill_geometry(step: np.void, geometry: Geometry) -> None:
    """Write a geometry into a row of `STEP`."""
    step["images"], step["channels"] = geometry.images, geometry.channels
    step["height"], step["width"] = geometry.size
    step["out_height"], step["out_width"] = geometry.out_size
    step["out_channels"] = geometry.out_channels
    step["share"], step["out_share"] = geometry.shares
    for name in ("kernel", "stride", "padding", "dilation"):
        short = "pad" if name == "padding" else name
        step[f"{short}_y"], step[f"{short}_x"] = getattr(geometry, name)


@jit
def ceil(value: int, divisor: int) -> int:
    """The least whole number that `divisor` times is at least `value`."""
    return (value + divisor - 1) // divisor


@jit
def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """The first and the end of a part's share of `count`."""
    each = ceil(count, parts)
    return min(count, part * each), min(count, (part + 1) * each)


@jit
def share_of_vectors(step: Any, part: int, parts: int) -> tuple[int, int]:
    """A part's share of all vectors of the images that a step reads, in bytes."""
    vectors = step.images * step.height * step.width * step.channels // WIDTH
    first, end = share(vectors, part, parts)
    return first * VECTOR_BYTES, end * VECTOR_BYTES


def takes_pixels(geometry: Geometry) -> bool:
    """Of a step that computes each pixel, or each of its numbers, by itself: can it run?"""
    return geometry.channels % WIDTH == 0 and geometry.kernel == (1, 1)


def no_scratch(geometry: Geometry) -> int:
    """Of a step that needs no memory of its own."""
    return 0


def _make_multiply() -> Any:
    """`multiply(bf16, columns, rows, ...)`: the product of float32 or of bfloat16 for that many
    vectors of a panel and that many rows, one branch for each. Where the CPU does not multiply
    bfloat16, no step does."""
    arguments = "a, b, c, c_stride, depth, start, other, flags, ahead"
    lines = [f"def multiply(bf16, columns, rows, {arguments}):", "    stand_alone()"]
    scope = {"stand_alone": stand_alone}
    for bf16 in (False, True) if HAS_BF16_DOT else (False,):
        for columns in range(1, PANEL_VECTORS + 1):
            lines.append(f"    if bf16 == {bf16} and columns == {columns}:")
            for rows in range(1, MAX_ROWS + 1):
                name = f"product_{rows}_{columns}_{bf16}"
                scope[name] = multiply_rows(rows, columns, bf16=bf16)
                lines.append(f"        if rows == {rows}:")
                lines.append(f"            return {name}({arguments})")
    exec("\n".join(lines), scope)
    return scope["multiply"]


multiply = jit(_make_multiply())


@jit
def multiply_floats(
    rows: int, a: int, b: int, c: int, c_stride: int, depth: int, start: int, ahead: int
) -> None:
    """The product of float32, with nothing added to it."""
    none = np.int64(0)  # a literal would have the code of all products compiled once more
    whole = np.int64(PANEL_VECTORS)
    multiply(bool(none), whole, rows, a, b, c, c_stride, depth, start, none, none, ahead)
