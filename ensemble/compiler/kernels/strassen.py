# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""A 1x1 convolution by one level of Strassen's algorithm: seven half-size products, not eight.

Pixels, channels and panels of weights are halved. Sums of weights are computed when these are
packed, sums of pixels for a group at a time, and each product is accumulated into the quarters of
the result while it is in registers. Strassen, Gaussian Elimination is not Optimal, Numer. Math. 13
(1969); sums fused into packing and microkernel: Huang and others, Strassen's Algorithm Reloaded,
SC16 (2016).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemble.compiler.codegen.gemm import RELU, SUBTRACT, multiply_into_two
from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    MAX_ROWS,
    PANEL,
    VECTOR_BYTES,
    WIDTH,
    load,
    no_inline,
    store,
)
from ensemble.compiler.kernels.kernel import (
    Kernel,
    ceil,
    cost,
    jit,
    jit_inline,
)
from ensemble.compiler.planning.step import Geometry

OPERANDS = 7  # of pixels and of weights: one per product
GROUP_BYTES = 256 * 1024  # of pixel operands at a time
# Rows of the microkernels: the halves of a tile may overlap, so few sizes suffice.
ROWS = tuple(
    sorted({1, 2, MAX_ROWS // 3, MAX_ROWS // 2, 3 * MAX_ROWS // 4, MAX_ROWS - 1, MAX_ROWS})
)
QUARTER = MAX_ROWS * PANEL * FLOAT_BYTES  # bytes of a quarter of a tile's result
PANEL_BYTES = PANEL * FLOAT_BYTES
# Multiply-adds that take as long as one float of an addition, of pixels or of a product.
MULTIPLY_ADDS_PER_ADDITION = 2


def _can_run(geometry: Geometry) -> bool:
    pointwise = geometry.kernel == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    halves = geometry.channels % (2 * WIDTH) == geometry.out_channels % (2 * PANEL) == 0
    return pointwise and halves


def _cost(geometry: Geometry) -> float:
    image = geometry.out_size[0] * geometry.out_size[1]
    tiles = -(-image // (2 * MAX_ROWS))
    rows = next(rows for rows in ROWS if 2 * rows * tiles >= image)
    # A register tile amortizes each load of a weight over its rows.
    pixels = geometry.images * tiles * 2 * MAX_ROWS * (rows + 2) / (MAX_ROWS + 2)
    factors = geometry.channels * geometry.out_channels
    additions = (
        MULTIPLY_ADDS_PER_ADDITION * pixels * (2 * geometry.channels + 6 * geometry.out_channels)
    )
    products = int((pixels * factors + additions) * OPERANDS / 8)
    return cost(products=products, weight_bytes=OPERANDS * factors)


def _scratch_bytes(geometry: Geometry) -> int:
    tile = OPERANDS * MAX_ROWS * geometry.channels // 2 * FLOAT_BYTES
    tiles = max(1, GROUP_BYTES // tile)
    return tiles * (tile + 4 * QUARTER)


def _empty(weight: Tensor) -> Tensor:
    """`(N, K / PANEL / 2, 7, C / 2, PANEL)`."""
    num_models, out_channels, channels, _, _ = weight.shape
    shape = (num_models, out_channels // PANEL // 2, OPERANDS, channels // 2, PANEL)
    return weight.new_empty(shape, dtype=torch.float32)


def _pack(weight: Tensor, target: Tensor) -> None:
    """In float64, in the order in which `_multiply_tile` reads the operands."""
    for two, rows in enumerate(weight.split(2 * PANEL)):
        (b11, b12), (b21, b22) = (
            half.split(PANEL, 1) for half in rows.flatten(1).double().mT.chunk(2)
        )
        sums = b11 + b22, b21 - b11, b11, b21 + b22, b12 - b22, b22, b11 + b12
        for product, operand in enumerate(sums):
            target[two, product].copy_(operand)


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """From the operands that are quarters, and differences of two."""
    _, below, b11, _, right, b22, _ = packed.unbind(1)
    left, right = torch.cat([b11, below + b11], 1), torch.cat([right + b22, b22], 1)
    return torch.cat([left, right], 2).mT.reshape(tuple(shape))


def _make_multiply() -> Any:
    """`multiply(rows, ...)`: dispatch to the microkernel for that many rows."""
    place = "base{0}, base_stride{0}, c{0}, c_stride{0}, other{0}, flags{0}"
    arguments = f"a, b, depth, ahead, {place.format(1)}, {place.format(2)}"
    lines = [f"def multiply(rows, {arguments}):", "    no_inline()"]
    scope = {"no_inline": no_inline}
    for rows in ROWS:
        scope[f"product_{rows}"] = multiply_into_two(rows)
        lines.append(f"    if rows == {rows}:")
        lines.append(f"        return product_{rows}({arguments})")
    exec("\n".join(lines), scope)
    return scope["multiply"]


_multiply = jit(_make_multiply())


@jit
def _half(count):
    """The rows of half a tile: the least of ROWS of which two cover `count` pixels."""
    for rows in ROWS:
        if 2 * rows >= count:
            break
    return rows


@jit
def _pixel(step, x, index):
    """The address of the input pixel of an output pixel."""
    if step.stride_y == 1 and step.stride_x == 1:
        return x + index * step.channels * FLOAT_BYTES
    image, place = divmod(index, step.out_height * step.out_width)
    y, x_ = divmod(place, step.out_width)
    pixel = (image * step.height + y * step.stride_y) * step.width + x_ * step.stride_x
    return x + pixel * step.channels * FLOAT_BYTES


@jit
def _pack_operands(step, x, first, count, rows, operands):
    """The seven operands of a tile of `count` pixels: its first `rows`, and its last."""
    half = step.channels // 2 * FLOAT_BYTES
    size = rows * half
    for row in range(rows):
        upper = _pixel(step, x, first + row)
        lower = _pixel(step, x, first + count - rows + row)
        target = operands + row * VECTOR_BYTES
        for channel in range(0, half, VECTOR_BYTES):
            a11, a12 = load(upper + channel), load(upper + half + channel)
            a21, a22 = load(lower + channel), load(lower + half + channel)
            store(target, a11 + a22)
            store(target + size, a22)
            store(target + 2 * size, a21 + a22)
            store(target + 3 * size, a12 - a22)
            store(target + 4 * size, a11)
            store(target + 5 * size, a11 + a12)
            store(target + 6 * size, a21 - a11)
            target += rows * VECTOR_BYTES


@jit_inline
def _multiply_tile(
    product, rows, a, b, depth, ahead, tile, bias, out, other, down, row_bytes, relu
):
    """One of the seven products, accumulated into its quarters: in `tile`, finally in `out`.

    down: bytes from a pixel of the upper half of the result to that of the lower. A quarter starts
    from the bias.
    """
    c11, c12, c21, c22 = tile, tile + QUARTER, tile + 2 * QUARTER, tile + 3 * QUARTER
    right = PANEL_BYTES
    bias2, out2, below = bias + right, out + right, out + down
    other2 = other + right if other != 0 else 0
    other_below = other + down if other != 0 else 0
    other2_below = other2 + down if other != 0 else 0
    p, r, s = PANEL_BYTES, row_bytes, SUBTRACT
    # Two destinations for each product; a single call inlines the code once, not seven times.
    if product == 0:
        first, second = (bias, 0, c11, p, 0, 0), (bias2, 0, c22, p, 0, 0)
    elif product == 1:
        first, second = (c11, p, c11, p, 0, 0), (bias, 0, c21, p, 0, 0)
    elif product == 2:
        first, second = (c21, p, below, r, other_below, relu), (c22, p, c22, p, 0, s)
    elif product == 3:
        first, second = (c11, p, c11, p, 0, 0), (0, 0, 0, 0, 0, 0)
    elif product == 4:
        first, second = (bias2, 0, c12, p, 0, 0), (c22, p, c22, p, 0, 0)
    elif product == 5:
        first, second = (c11, p, out, r, other, s + relu), (c12, p, out2, r, other2, relu)
    else:
        first, second = (c22, p, out2 + down, r, other2_below, relu), (0, 0, 0, 0, 0, 0)
    _multiply(rows, a, b, depth, ahead, *first, *second)


@jit
def _tile(step, index):
    """The first pixel of a tile, and how many it has, all of one image."""
    image = step.out_height * step.out_width
    tiles = ceil(image, 2 * MAX_ROWS)
    size = ceil(image, tiles)
    which, place = divmod(index, tiles)
    return which * image + place * size, min(size, image - place * size)


@jit_inline
def _multiply_group(
    step, operands, tile_bytes, tiles, factors, bias, out, other, first, end, following
):
    """All tiles of a group times two panels: each operand of weights is read once.

    Prefetches the next weights, or the pixels from `following` on (0: none), two products of a tile
    as much as a tile reads.
    """
    half, row_bytes = step.channels // 2, step.out_channels * FLOAT_BYTES
    relu = RELU if step.relu else 0
    for product in range(OPERANDS):
        b = factors + product * half * PANEL_BYTES
        for index in range(end - first):
            start, count = _tile(step, first + index)
            rows = _half(count)
            a = operands + index * tile_bytes + product * rows * half * FLOAT_BYTES
            place, down = start * row_bytes, (count - rows) * row_bytes
            added = other + place if other != 0 else 0
            tile = tiles + index * 4 * QUARTER
            ahead = half * PANEL_BYTES
            if following != 0 and product < 2:
                ahead = following + (2 * index + product) * ahead - b
            _multiply_tile(
                product,
                rows,
                a,
                b,
                half,
                ahead,
                tile,
                bias,
                out + place,
                added,
                down,
                row_bytes,
                relu,
            )


@jit
def _plan(step, parts):
    """The number of tiles and of groups, and whether parts divide the panels instead of the groups.

    A tile is of one image: sums over two would carry a NaN, or the rounding error of large numbers,
    from one image into another.
    """
    tile_bytes = OPERANDS * MAX_ROWS * step.channels // 2 * FLOAT_BYTES
    tiles = step.images * ceil(step.out_height * step.out_width, 2 * MAX_ROWS)
    groups = ceil(tiles, max(1, GROUP_BYTES // tile_bytes))
    by_panels = groups < 4 * parts and step.out_channels // PANEL // 2 >= parts
    if parts > 1 and not by_panels:
        groups = max(groups, min(tiles, 4 * parts))
    return tiles, groups, by_panels


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """Groups of tiles of pixels; for each, all panels, two at a time.

    weight is `(out_channels / PANEL / 2, 7, channels / 2, PANEL)`.
    """
    half = step.channels // 2
    tile_bytes = OPERANDS * MAX_ROWS * half * FLOAT_BYTES
    tiles, groups, by_panels = _plan(step, parts)
    group = ceil(tiles, groups)  # tiles of a group
    group_part, group_parts = (0, 1) if by_panels else (part, parts)
    panel_part, panel_parts = (part, parts) if by_panels else (0, 1)
    operands = scratch + group * 4 * QUARTER
    for first in range(group_part * group, tiles, group_parts * group):
        end = min(first + group, tiles)
        for index in range(first, end):
            start, count = _tile(step, index)
            _pack_operands(
                step, x, start, count, _half(count), operands + (index - first) * tile_bytes
            )
        following = x + _tile(step, end)[0] * step.channels * FLOAT_BYTES
        for index in range(panel_part, step.out_channels // PANEL // 2, panel_parts):
            right = 2 * index * PANEL_BYTES
            b, start, c = weight + index * OPERANDS * half * PANEL_BYTES, bias + right, out + right
            added = other + right if other != 0 else 0
            prefetched = following if index == panel_part and end < tiles else 0
            _multiply_group(
                step, operands, tile_bytes, scratch, b, start, c, added, first, end, prefetched
            )


STRASSEN = Kernel(
    *(_body, _can_run, _scratch_bytes, 0, _empty, _pack, _unpack, _cost),
    fuses_relu=True,
    is_row_wise=True,
)
