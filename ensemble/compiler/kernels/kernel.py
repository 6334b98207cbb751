"""The definition of a kernel, the layout of a step in a program's table, and shared helpers."""

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
    no_inline,
)
from ensemble.compiler.planning.step import Geometry

if TYPE_CHECKING:
    from torch import Tensor

# An operand is an address and its stride in bytes from model to model.
IN_ARENA = -1  # the stride of an operand in the core's own arena, whose address is an offset
OPERANDS = ("x", "weight", "bias", "other", "out")
_GEOMETRY = (
    *("images", "height", "width", "channels", "out_height", "out_width", "out_channels"),
    *("kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x"),
    *("dilation_y", "dilation_x", "group_channels", "group_out_channels"),
)
STEP_DTYPE = np.dtype(
    [(f"{name}{part}", np.int64) for name in OPERANDS for part in ("", "_stride")]
    + [
        (name, np.int64)
        for name in (
            *("kind", "variant", "relu", "activation", "option", "unpadded_channels"),
            *_GEOMETRY,
        )
    ]
    + [("scalar", np.float64)]
)


@dataclass(frozen=True)
class Kernel:
    """A kernel: it computes a step of one model.

    body is compiled by numba: `(step, x, weight, bias, other, out, scratch, part, parts)`, a row of
    `STEP_DTYPE` and addresses, computes one part of `parts`. `variant` is a parameter of the body.
    """

    body: Any
    can_run: Callable[[Geometry], bool]
    scratch_bytes: Callable[[Geometry], int]  # an upper bound
    variant: int = 0
    # For weights `(N, K, C, R, S)`: allocate the packed stack, pack one model into it, and unpack
    # one model to its shape `(K, C, R, S)`.
    empty: Callable[[Tensor], Tensor] | None = None
    pack: Callable[[Tensor, Tensor], None] | None = None
    unpack: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    # Cost model, in multiply-adds of one model on one core; every convolution has one.
    cost: Callable[[Geometry], float] | None = None
    # The epilogue: relu in registers, or every activation on a block that is still in L1.
    fuses_relu: bool = False
    fuses_activations: bool = False
    is_row_wise: bool = False  # computes rows independently, with weights that are read quickly
    is_in_place: bool = False  # reads each element before it writes it, and no other


# Multiply-adds per byte of weights read from memory (here 57 G/s against 14 GB/s): a call reads a
# model's weights once, and no cache holds those of N models.
MULTIPLY_ADDS_PER_WEIGHT_BYTE = 4
# Multiply-adds that take as long as transforming one float of a Winograd tile.
MULTIPLY_ADDS_PER_TRANSFORM = 6


def cost(*, products: int, weight_bytes: int, transforms: int = 0) -> float:
    """The cost model: a roofline over arithmetic and weight traffic, plus transforms."""
    return (
        max(products, weight_bytes * MULTIPLY_ADDS_PER_WEIGHT_BYTE)
        + transforms * MULTIPLY_ADDS_PER_TRANSFORM
    )


def panels_of(channels: int) -> int:
    """How many panels hold so many channels; packing pads the last one with zeros."""
    return -(-channels // PANEL)


def jit(function: Any) -> Any:
    """Compile by numba, without the GIL, with C's semantics of division."""
    return njit(nogil=True, error_model="numpy")(function)


def jit_inline(function: Any) -> Any:
    """`jit`, inlined by numba into its caller.

    LLVM optimizes a callee again within each caller, so a thin wrapper around large code would
    dominate the compile time.
    """
    return njit(nogil=True, error_model="numpy", inline="always")(function)


def fill_geometry(step: np.void, geometry: Geometry) -> None:
    """Write a geometry into a row of a step table."""
    step["images"], step["channels"] = geometry.images, geometry.channels
    step["height"], step["width"] = geometry.size
    step["out_height"], step["out_width"] = geometry.out_size
    step["out_channels"] = geometry.out_channels
    step["group_channels"], step["group_out_channels"] = geometry.channels_per_group
    for name in ("kernel", "stride", "padding", "dilation"):
        short = "pad" if name == "padding" else name
        step[f"{short}_y"], step[f"{short}_x"] = getattr(geometry, name)


@jit
def ceil(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return (value + divisor - 1) // divisor


@jit
def part_range(count: int, part: int, parts: int) -> tuple[int, int]:
    """The first and the end of a part's items, of `count`."""
    each = ceil(count, parts)
    return min(count, part * each), min(count, (part + 1) * each)


@jit
def vector_range(step: Any, part: int, parts: int) -> tuple[int, int]:
    """The vectors of a part, of all that an elementwise step reads, in bytes."""
    vectors = step.images * step.height * step.width * step.channels // WIDTH
    first, end = part_range(vectors, part, parts)
    return first * VECTOR_BYTES, end * VECTOR_BYTES


def is_elementwise(geometry: Geometry) -> bool:
    """Can an elementwise kernel, or one that works on each pixel, run it?"""
    return geometry.channels % WIDTH == 0 and geometry.kernel == (1, 1)


def no_scratch(geometry: Geometry) -> int:
    """Of a kernel without scratch memory."""
    return 0


def _make_multiply() -> Any:
    """`multiply(bf16, columns, rows, ...)`: dispatch to the GEMM microkernel for float32 or
    bfloat16, that many vectors of a panel and that many rows. Without bfloat16 instructions there
    are no bfloat16 microkernels."""
    arguments = "a, b, c, c_stride, depth, start, other, flags, ahead"
    lines = [f"def multiply(bf16, columns, rows, {arguments}):", "    no_inline()"]
    scope = {"no_inline": no_inline}
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
    """The float32 microkernel without an epilogue."""
    none = np.int64(0)  # a literal type would compile all microkernels a second time
    whole = np.int64(PANEL_VECTORS)
    multiply(bool(none), whole, rows, a, b, c, c_stride, depth, start, none, none, ahead)
