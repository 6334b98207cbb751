# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Grouped convolution, down to depthwise: a product per tap, without im2col.

An output reads few inputs, so im2col would cost more than it saves. Instead tiles of image rows are
copied with their zero padding, so that the pixels which neighboring outputs read at a tap are
contiguous.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble.compiler.codegen.depthwise import multiply_taps
from ensemble.compiler.codegen.gemm import ADD_OTHER, RELU
from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    REGISTERS,
    VECTOR_BYTES,
    WIDTH,
    load,
    no_inline,
    prefetch,
    splat,
    store,
)
from ensemble.compiler.kernels.activation import NONE, activate
from ensemble.compiler.kernels.kernel import (
    Kernel,
    ceil,
    cost,
    jit,
    jit_inline,
)
from ensemble.compiler.planning.step import Geometry
from ensemble.compiler.planning.vector_layout import (
    groups_fit_lanes,
    widest_window,
    window,
    window_period,
)

TILE_BYTES = 256 * 1024  # of padded input at a time
PLANES = 4  # vectors of channels that are copied at a time, unless groups are wider
# Pixels of a register tile; the other registers hold weights and inputs.
SIZES = tuple(size for size in (14, 7, 4, 1) if size <= REGISTERS // 2 - 2)
# Channels per group of groups that fit the lanes of a vector; others read windows of vectors.
LANES = tuple(count for count in range(1, WIDTH) if groups_fit_lanes(count, count))
COST_PER_LANE_PRODUCT = 4 / 3  # relative to another product: an input is shuffled to its lanes
# Taps of a row, at stride 1, that share one load and shuffle of an input, by lanes.
RUNS = {lanes: (3, 5, 7) if lanes == 1 else (3,) for lanes in LANES}


def _can_run(geometry: Geometry) -> bool:
    return geometry.groups > 1 and geometry.channels % WIDTH == geometry.out_channels % WIDTH == 0


def _cost(geometry: Geometry) -> float:
    per_group = geometry.channels_per_group
    vectors, planes = geometry.out_channels // WIDTH, geometry.channels // WIDTH
    if groups_fit_lanes(*per_group):
        inputs = geometry.out_channels * per_group[0] * COST_PER_LANE_PRODUCT
    else:
        windows = (window(vector, *per_group, planes) for vector in range(vectors))
        inputs = WIDTH * sum((end - first) * WIDTH for first, end in windows)
    taps = geometry.kernel[0] * geometry.kernel[1]
    products = geometry.images * geometry.out_size[0] * geometry.out_size[1] * taps * inputs
    weight_bytes = 4 * taps * per_group[0] * geometry.out_channels
    return cost(products=int(products), weight_bytes=weight_bytes)


def _scratch_bytes(geometry: Geometry) -> int:
    planes = max(PLANES, window_period(*geometry.channels_per_group)[0])
    line = geometry.size[1] + 2 * geometry.padding[1] + geometry.stride[1]
    reach = (geometry.kernel[0] - 1) * geometry.dilation[0] + 1
    least = planes * line * reach * VECTOR_BYTES  # of one row of outputs
    return max(TILE_BYTES, least) + VECTOR_BYTES


def _empty(weight: Tensor) -> Tensor:
    """`(N, K / WIDTH, P, R * S, C / P, WIDTH)`: C channels of a group, or of P vectors."""
    num_models, out_channels, channels, rows, columns = weight.shape
    planes = max(1, channels // WIDTH)
    shape = (planes, rows * columns, channels // planes, WIDTH)
    return weight.new_empty((num_models, out_channels // WIDTH, *shape), dtype=torch.float32)


def _pack(weight: Tensor, target: Tensor) -> None:
    vectors = weight.flatten(2).unflatten(0, (-1, WIDTH)).unflatten(2, (target.shape[1], -1))
    target.copy_(vectors.permute(0, 2, 4, 3, 1))


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed.permute(0, 4, 1, 3, 2).reshape(tuple(shape))


def _make_convolve() -> Any:
    """`convolve(lanes, pixels, run, ...)`: dispatch to the depthwise microkernel.

    Without a microkernel for a run, its taps are multiplied one by one.
    """
    arguments = "x, offsets, taps, weights, c, c_stride, start, other, flags"
    lines = [f"def convolve(lanes, pixels, run, {arguments}):", "    no_inline()"]
    scope = {"no_inline": no_inline}
    for lanes in (0, *LANES):
        for pixels in SIZES:
            longer = RUNS.get(lanes, ()) if pixels > 1 else ()
            for run in (*longer, 1):
                name, has_run = f"taps_{lanes}_{pixels}_{run}", f" and run == {run}"
                scope[name] = multiply_taps(pixels, lanes, run)
                condition = f"lanes == {lanes} and pixels == {pixels}{has_run if run > 1 else ''}"
                lines += [f"    if {condition}:", f"        return {name}({arguments})"]
    exec("\n".join(lines), scope)
    return scope["convolve"]


_convolve = jit(_make_convolve())


@jit
def _pixels_at_once(width):
    """Pixels of the register tiles of a row: the last may overlap, each costs two more pixels."""
    best, lowest = 1, 3 * width
    for size in SIZES:
        time = ceil(width, size) * (size + 2)
        if size <= width and time < lowest:
            best, lowest = size, time
    return best


@jit
def _copy_tile(step, image, channel, planes, first_y, lines, phase_width, tile):
    """Copy `lines` rows of some channels, from first_y (which may lie above the image) on.

    Each vector of channels is a plane. A row holds the columns 0, stride, 2 stride, ... then 1,
    1 + stride, ...: the pixels that neighboring outputs read at a tap are contiguous.
    """
    pixel_bytes = step.channels * FLOAT_BYTES
    plane_bytes = lines * phase_width * step.stride_x * VECTOR_BYTES
    first = image + channel * FLOAT_BYTES
    target = tile
    for y in range(first_y, first_y + lines):
        source = first + y * step.width * pixel_bytes
        inside = 0 <= y < step.height
        for phase in range(step.stride_x):
            for column in range(phase_width):
                in_x = column * step.stride_x + phase - step.pad_x
                if inside and 0 <= in_x < step.width:
                    at = source + in_x * pixel_bytes
                    for plane in range(planes):
                        store(target + plane * plane_bytes, load(at + plane * VECTOR_BYTES))
                else:
                    for plane in range(planes):
                        store(target + plane * plane_bytes, splat(np.float32(0)))
                target += VECTOR_BYTES


@jit
def _find_taps(step, planes, lines, phase_width, offsets):
    """The offset in a tile at which each tap reads, relative to the first; taps within planes."""
    line_bytes, taps = phase_width * step.stride_x * VECTOR_BYTES, step.kernel_y * step.kernel_x
    for tap in range(taps):
        tap_y, tap_x = divmod(tap, step.kernel_x)
        column, phase = divmod(tap_x * step.dilation_x, step.stride_x)
        at = tap_y * step.dilation_y * line_bytes + (phase * phase_width + column) * VECTOR_BYTES
        for plane in range(planes):
            offsets[plane * taps + tap] = at + plane * lines * line_bytes


@jit
def _prefetch_lines(step, vector, first_y, lines):
    """Prefetch rows of one vector of channels, whose first pixel of the image is at `vector`."""
    pixel_bytes = step.channels * FLOAT_BYTES
    for y in range(max(first_y, 0), min(first_y + lines, step.height)):
        first = vector + y * step.width * pixel_bytes
        for x in range(step.width):
            prefetch(first + x * pixel_bytes)


@jit_inline
def _convolve_tile(
    step, tile, line_bytes, offsets, taps, factors, start, other, out, rows, ahead, y
):
    """One vector of output channels of some rows; out and other are those of the first pixel.

    Prefetches one vector of channels of the next tile, `ahead` (0: none), from row y on: the copy
    reads with a large stride, which the hardware prefetcher does not follow.
    """
    lanes = (
        step.group_channels if groups_fit_lanes(step.group_channels, step.group_out_channels) else 0
    )
    pixels = _pixels_at_once(step.out_width)
    run = step.kernel_x if step.stride_x == 1 and step.dilation_x == 1 else 1
    pixel = step.out_channels * FLOAT_BYTES  # from one to the next
    flags = (ADD_OTHER if other != 0 else 0) + (RELU if step.relu else 0)
    for row in range(rows):
        line = tile + row * step.stride_y * line_bytes
        if ahead != 0:
            _prefetch_lines(step, ahead, y + row * step.stride_y, step.stride_y)
        for first in range(0, step.out_width, pixels):
            x0 = min(first, step.out_width - pixels)
            place = (row * step.out_width + x0) * pixel
            a, c, added = line + x0 * VECTOR_BYTES, out + place, other + place
            _convolve(lanes, pixels, run, a, offsets, taps, factors, c, pixel, start, added, flags)
            if step.activation != NONE:
                activate(step.activation, step.scalar, c, c, pixel, pixels, np.int64(1))


@jit
def _plan(step, planes):
    """The width of a column phase, output rows and input lines of a tile, and the number of tiles.

    `planes` of a tile fit `TILE_BYTES`, unless one row of outputs needs more.
    """
    phase_width = ceil(step.width + 2 * step.pad_x, step.stride_x)
    line_bytes = phase_width * step.stride_x * VECTOR_BYTES
    reach = (step.kernel_y - 1) * step.dilation_y + 1
    most = (TILE_BYTES // (planes * line_bytes) - reach) // step.stride_y + 1
    tiles = ceil(step.out_height, max(1, min(most, step.out_height)))
    rows = ceil(step.out_height, tiles)
    return phase_width, rows, (rows - 1) * step.stride_y + reach, tiles


@jit
def _sets(step):
    """The blocking of the channels.

    The input vectors of a set, which no output vector reads together with others; the output
    vectors that read a set; the sets that are copied together.
    """
    planes, readers = 1, 1
    if not groups_fit_lanes(step.group_channels, step.group_out_channels):
        planes, readers = window_period(step.group_channels, step.group_out_channels)
    sets = ceil(step.channels, planes * WIDTH)
    return planes, readers, min(sets, max(1, PLANES // planes))


@jit
def _vector_bytes(step):
    """The weights of one output vector, padded to the widest window."""
    channels = step.group_channels
    if not groups_fit_lanes(step.group_channels, step.group_out_channels):
        channels = WIDTH * widest_window(step.group_channels, step.group_out_channels)
    return step.kernel_y * step.kernel_x * channels * VECTOR_BYTES


@jit
def _read_by(step, vector):
    """The input vectors that an output vector reads: first and end."""
    if groups_fit_lanes(step.group_channels, step.group_out_channels):
        return vector, vector + 1
    return window(vector, step.group_channels, step.group_out_channels, step.channels // WIDTH)


@jit
def _find(step, x, index, tiles, blocks, rows, at_once):
    """A tile: its image, first output row, first input line (which may lie above the image) and
    first vector of channels."""
    place, block = divmod(index, blocks)
    image, tile = divmod(place, tiles)
    y0 = min(tile * rows, step.out_height - rows)
    image_bytes = step.height * step.width * step.channels * FLOAT_BYTES
    return x + image * image_bytes, image, y0, y0 * step.stride_y - step.pad_y, block * at_once


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """Tiles of image rows; for each the channels that an output vector reads.

    weight is `(out_channels / WIDTH, planes, taps, channels, WIDTH)`.
    """
    planes, readers, at_once = _sets(step)
    together, every = at_once * planes, step.channels // WIDTH  # vectors of inputs
    phase_width, rows, lines, tiles = _plan(step, together)
    plane_bytes = lines * phase_width * step.stride_x * VECTOR_BYTES
    table = np.empty(step.kernel_y * step.kernel_x * planes, np.int64)
    _find_taps(step, planes, lines, phase_width, table)
    blocks, vector_bytes = ceil(every, together), _vector_bytes(step)
    count = step.images * tiles * blocks
    for index in range(part, count, parts):
        source, image, y0, first_y, first = _find(step, x, index, tiles, blocks, rows, together)
        copied = min(every - first, together)
        _copy_tile(step, source, first * WIDTH, copied, first_y, lines, phase_width, scratch)
        following, y, after = 0, 0, 0
        # A depthwise tile ends before a prefetch could help.
        if step.group_channels > 1 and index + parts < count:
            following, _, _, y, after = _find(step, x, index + parts, tiles, blocks, rows, together)
        begin = first // planes * readers
        for vector in range(begin, min(begin + at_once * readers, step.out_channels // WIDTH)):
            pixel = (image * step.out_height + y0) * step.out_width
            at = (pixel * step.out_channels + vector * WIDTH) * FLOAT_BYTES
            added = other + at if other != 0 else 0
            factors, start = weight + vector * vector_bytes, bias + vector * VECTOR_BYTES
            plane, end = _read_by(step, vector)
            taps = (end - plane) * step.kernel_y * step.kernel_x
            read, offsets = scratch + (plane - first) * plane_bytes, table.ctypes.data
            ahead = following
            if following != 0:
                ahead += min(after + (vector - begin) % copied, every - 1) * VECTOR_BYTES
            line, c = plane_bytes // lines, out + at
            _convolve_tile(
                step, read, line, offsets, taps, factors, start, added, c, rows, ahead, y
            )


GROUPED = Kernel(
    *(_body, _can_run, _scratch_bytes, 0, _empty, _pack, _unpack, _cost),
    fuses_relu=True,
    fuses_activations=True,
    is_row_wise=True,
)
