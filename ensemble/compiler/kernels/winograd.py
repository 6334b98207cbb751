# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""A 3x3 convolution at stride 1 by Winograd's minimal filtering: F(4x4, 3x3) and F(2x2, 3x3).

Input tiles are transformed, multiplied by one GEMM per plane of the transform, and transformed
back. Matrices as in Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv
1509.09308.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    MAX_ROWS,
    PANEL,
    VECTOR_BYTES,
    WIDTH,
    bounded_or_nan,
    load,
    maximum,
    splat,
    store,
)
from ensemble.compiler.kernels.kernel import (
    Kernel,
    ceil,
    cost,
    jit,
    jit_inline,
    multiply_floats,
    panels_of,
)
from ensemble.compiler.planning.step import Geometry

GROUP_TILES = 2 * MAX_ROWS  # transformed at a time
MAX_PLANES = 36

# G of F(2x2, 3x3) and of F(4x4, 3x3).
_FILTER_TRANSFORMS = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}


def _can_run(geometry: Geometry) -> bool:
    whole = geometry.channels % WIDTH == geometry.out_channels % WIDTH == 0
    plain = geometry.stride == geometry.dilation == (1, 1) and geometry.groups == 1
    return whole and plain and geometry.kernel == (3, 3)


def _cost(tile: int, geometry: Geometry) -> float:
    planes = (tile + 2) ** 2
    filters = geometry.channels * geometry.out_channels
    tiles = geometry.images * -(-geometry.out_size[0] // tile) * -(-geometry.out_size[1] // tile)
    return cost(
        products=tiles * planes * filters,
        weight_bytes=4 * planes * filters,
        transforms=tiles * planes * (geometry.channels + geometry.out_channels),
    )


def _scratch_bytes(geometry: Geometry) -> int:
    row = (geometry.channels + geometry.out_channels + WIDTH) * FLOAT_BYTES
    planes = MAX_PLANES * (GROUP_TILES * row + 4 * VECTOR_BYTES)
    return planes + row + PANEL * FLOAT_BYTES + 4 * VECTOR_BYTES


def _empty(tile: int, weight: Tensor) -> Tensor:
    """`(N, planes, K / PANEL, C, PANEL)`, the last panel padded with zeros."""
    num_models, out_channels, channels, _, _ = weight.shape
    shape = (num_models, (tile + 2) ** 2, panels_of(out_channels), channels, PANEL)
    return weight.new_empty(shape, dtype=torch.float32)


def _pack(tile: int, weight: Tensor, target: Tensor) -> None:
    """Transform in float64, a panel at a time: no large intermediate in float64.

    G W G^T of all filters of a panel is one matrix product, whose rows are in the kernel's layout.
    """
    g = torch.tensor(_FILTER_TRANSFORMS[tile], dtype=torch.float64, device="cpu")
    both = torch.kron(g, g)  # (planes, 9)
    for panel, rows in enumerate(weight.split(PANEL)):
        taps = rows.flatten(2).permute(2, 1, 0).contiguous().double()
        padded = functional.pad(taps, (0, PANEL - len(rows)))  # (9, C, PANEL)
        target[:, panel].copy_((both @ padded.flatten(1)).view(len(both), -1, PANEL))


def _unpack(tile: int, packed: Tensor, shape: Sequence[int]) -> Tensor:
    """By the pseudoinverse of G, in float64 like `_pack`."""
    g = torch.tensor(_FILTER_TRANSFORMS[tile], dtype=torch.float64, device="cpu")
    inverse = torch.linalg.pinv(torch.kron(g, g))  # (9, planes)
    panels = [inverse @ panel.flatten(1).double() for panel in packed.unbind(1)]
    taps = torch.stack(panels).float().unflatten(2, (-1, PANEL))  # (K / PANEL, 9, C, PANEL)
    return taps.permute(0, 3, 2, 1).flatten(0, 1)[: shape[0]].reshape(tuple(shape))


# Along one line: input patch -> transform, and products -> output tile.


@jit
def _input_4(line):
    a, b, c, d, e, f = line
    four, five, two = np.float32(4), np.float32(5), np.float32(2)
    ec, db = e - four * c, d - four * b
    e_c, d_b = e - c, two * (d - b)
    return four * a - five * c + e, ec + db, ec - db, e_c + d_b, e_c - d_b, four * b - five * d + f


@jit
def _output_4(line):
    a, b, c, d, e, f = line
    two, four, eight = np.float32(2), np.float32(4), np.float32(8)
    plus, minus, plus_2, minus_2 = b + c, b - c, d + e, d - e
    last = minus + eight * minus_2 + f
    return a + plus + plus_2, minus + two * minus_2, plus + four * plus_2, last


@jit
def _input_2(line):
    a, b, c, d = line
    return a - c, b + c, c - b, b - d


@jit
def _output_2(line):
    a, b, c, d = line
    return a + b + c, b - c - d


@jit
def _load_2(at, step):
    return load(at), load(at + step)


@jit
def _load_4(at, step):
    return load(at), load(at + step), load(at + 2 * step), load(at + 3 * step)


@jit
def _load_6(at, step):
    a, b, c, d = _load_4(at, step)
    return a, b, c, d, load(at + 4 * step), load(at + 5 * step)


@jit
def _column_4(pixels, x, channel):
    return (
        load(pixels[x] + channel),
        load(pixels[4 + x] + channel),
        load(pixels[8 + x] + channel),
        load(pixels[12 + x] + channel),
    )


@jit
def _column_6(pixels, x, channel):
    return (
        load(pixels[x] + channel),
        load(pixels[6 + x] + channel),
        load(pixels[12 + x] + channel),
        load(pixels[18 + x] + channel),
        load(pixels[24 + x] + channel),
        load(pixels[30 + x] + channel),
    )


@jit
def _store_2(at, step, line):
    a, b = line
    store(at, a)
    store(at + step, b)


@jit
def _store_4(at, step, line):
    a, b, c, d = line
    store(at, a)
    store(at + step, b)
    store(at + 2 * step, c)
    store(at + 3 * step, d)


@jit
def _store_6(at, step, line):
    a, b, c, d, e, f = line
    _store_4(at, step, (a, b, c, d))
    store(at + 4 * step, e)
    store(at + 5 * step, f)


def _make_input_tile(
    patch: int, transform: Any, column: Any, load_line: Any, store_line: Any
) -> Any:
    @jit
    def input_tile(pixels, channels, target, channel_step, plane, work):
        """Transform a patch of pixel addresses; element (y, x) goes to plane (y, x)."""
        for channel in range(0, channels * FLOAT_BYTES, VECTOR_BYTES):
            for x in range(patch):
                line = transform(column(pixels, x, channel))
                store_line(work + x * VECTOR_BYTES, patch * VECTOR_BYTES, line)
            for y in range(patch):
                line = transform(load_line(work + y * patch * VECTOR_BYTES, VECTOR_BYTES))
                store_line(target + y * patch * plane, plane, line)
            target += channel_step

    return input_tile


def _make_output_tile(tile: int, transform: Any, load_line: Any, store_line: Any) -> Any:
    patch = tile + 2

    @jit
    def output_tile(step, source, plane, bias, other, out, y0, x0, work):
        """Transform a tile's products back, add bias and other, and clip to the image."""
        row, pixel = (
            step.out_width * step.out_channels * FLOAT_BYTES,
            step.out_channels * FLOAT_BYTES,
        )
        height, width = min(tile, step.out_height - y0), min(tile, step.out_width - x0)
        zero = splat(np.float32(0))
        for channel in range(0, step.out_channels * FLOAT_BYTES, VECTOR_BYTES):
            for x in range(patch):
                line = transform(load_line(source + channel + x * plane, patch * plane))
                store_line(work + x * VECTOR_BYTES, patch * VECTOR_BYTES, line)
            own_bias = load(bias + channel)
            for y in range(height):
                line = transform(load_line(work + y * patch * VECTOR_BYTES, VECTOR_BYTES))
                at = work + patch * patch * VECTOR_BYTES
                store_line(at, VECTOR_BYTES, line)
                for x in range(width):
                    place = (y0 + y) * row + (x0 + x) * pixel + channel
                    value = load(at + x * VECTOR_BYTES) + own_bias
                    if other != 0:
                        value = value + load(other + place)
                    if step.relu:
                        value = maximum(bounded_or_nan(value), zero)
                    store(out + place, value)

    return output_tile


_input_tile_4 = _make_input_tile(6, _input_4, _column_6, _load_6, _store_6)
_input_tile_2 = _make_input_tile(4, _input_2, _column_4, _load_4, _store_4)
_output_tile_4 = _make_output_tile(4, _output_4, _load_6, _store_4)
_output_tile_2 = _make_output_tile(2, _output_2, _load_4, _store_2)


@jit
def _find_pixels(step, x, index, pixels, zeros):
    """The addresses of the pixels of a patch; outside the image, that of zeros."""
    tile, patch = step.variant, step.variant + 2
    tiles_y, tiles_x = ceil(step.out_height, tile), ceil(step.out_width, tile)
    image, place = divmod(index, tiles_y * tiles_x)
    tile_y, tile_x = divmod(place, tiles_x)
    row_bytes = step.channels * FLOAT_BYTES
    start = x + image * step.height * step.width * row_bytes
    for y in range(patch):
        for x_ in range(patch):
            in_y, in_x = tile_y * tile - step.pad_y + y, tile_x * tile - step.pad_x + x_
            inside = 0 <= in_y < step.height and 0 <= in_x < step.width
            at = start + (in_y * step.width + in_x) * row_bytes
            pixels[y * patch + x_] = at if inside else zeros


@jit
def _transform_inputs(step, x, inputs, plane, first, count, rows, zeros, work):
    """Transform `count` tiles from the first on, in blocks of `rows` as the GEMM reads them."""
    pixels = np.empty(MAX_PLANES, np.int64)
    row_bytes = step.channels * FLOAT_BYTES
    for index in range(count):
        _find_pixels(step, x, first + index, pixels, zeros)
        block, row = divmod(index, rows)
        line = min(rows, count - block * rows) * VECTOR_BYTES
        target = inputs + block * rows * row_bytes + row * VECTOR_BYTES
        if step.variant == 4:
            _input_tile_4(pixels, step.channels, target, line, plane, work)
        else:
            _input_tile_2(pixels, step.channels, target, line, plane, work)


@jit_inline
def _multiply_planes(step, inputs, plane_in, weight, products, plane_out, row_out, zeros, count):
    """One GEMM per plane."""
    planes, panels = (step.variant + 2) ** 2, ceil(step.out_channels, PANEL)
    row_in, panel_bytes = step.channels * FLOAT_BYTES, PANEL * FLOAT_BYTES
    rows = ceil(count, ceil(count, MAX_ROWS))
    ahead = step.channels * panel_bytes
    for plane in range(planes):
        for panel in range(panels):
            factors = weight + (plane * panels + panel) * ahead
            for row in range(0, count, rows):
                a = inputs + plane * plane_in + row * row_in
                c = products + plane * plane_out + panel * panel_bytes + row * row_out
                block, depth = min(rows, count - row), step.channels
                multiply_floats(block, a, factors, c, row_out, depth, zeros, ahead)


@jit
def _transform_outputs(step, products, plane, row_bytes, bias, other, out, first, count, work):
    """Products of `count` tiles -> output pixels."""
    tile = step.variant
    tiles_y, tiles_x = ceil(step.out_height, tile), ceil(step.out_width, tile)
    image_bytes = step.out_height * step.out_width * step.out_channels * FLOAT_BYTES
    for index in range(count):
        image, place = divmod(first + index, tiles_y * tiles_x)
        tile_y, tile_x = divmod(place, tiles_x)
        source, target = products + index * row_bytes, out + image * image_bytes
        added = other + image * image_bytes if other != 0 else 0
        y0, x0 = tile_y * tile, tile_x * tile
        if tile == 4:
            _output_tile_4(step, source, plane, bias, added, target, y0, x0, work)
        else:
            _output_tile_2(step, source, plane, bias, added, target, y0, x0, work)


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """weight is `((tile + 2) ** 2, out_channels / PANEL, channels, PANEL)`."""
    tile = step.variant
    planes = (tile + 2) ** 2
    tiles = step.images * ceil(step.out_height, tile) * ceil(step.out_width, tile)
    group = ceil(tiles, max(parts, ceil(tiles, GROUP_TILES)))
    # Planes are padded by a vector, or all would map to one set of the cache. So are rows of
    # products, since a partial last panel is written whole.
    row_in = step.channels * FLOAT_BYTES
    row_out = step.out_channels * FLOAT_BYTES + VECTOR_BYTES
    plane_in = group * row_in + VECTOR_BYTES
    plane_out = group * row_out + VECTOR_BYTES
    zeros = scratch + 2 * planes * VECTOR_BYTES
    zero_bytes = max(row_in, PANEL * FLOAT_BYTES)
    inputs = zeros + zero_bytes
    products = inputs + planes * plane_in
    for at in range(0, zero_bytes, VECTOR_BYTES):
        store(zeros + at, splat(np.float32(0)))
    for first in range(part * group, tiles, parts * group):
        count = min(group, tiles - first)
        rows = ceil(count, ceil(count, MAX_ROWS))
        _transform_inputs(step, x, inputs, plane_in, first, count, rows, zeros, scratch)
        _multiply_planes(step, inputs, plane_in, weight, products, plane_out, row_out, zeros, count)
        _transform_outputs(
            step, products, plane_out, row_out, bias, other, out, first, count, scratch
        )


def _kernel(tile: int) -> Kernel:
    empty, pack, unpack = (partial(of, tile) for of in (_empty, _pack, _unpack))
    tile_cost = partial(_cost, tile)
    arguments = _body, _can_run, _scratch_bytes, tile, empty, pack, unpack, tile_cost
    return Kernel(*arguments, fuses_relu=True)


WINOGRAD_2, WINOGRAD_4 = _kernel(2), _kernel(4)
