# mypy: ignore-errors
# numba finds the types of these functions, from the arguments of `run`.
"""Convolutions and pooling of one model, channels-last in float32, compiled by numba.

A program is a table of steps (`STEP`). `run` takes each model through all its steps on one core,
so that its activations stay in that core's cache; models left over when every core has had as many
as the others are shared, step by step, by all cores.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ensemble.ops import operation, simd
from ensemble.ops.operation import Geometry, Kind
from ensemble.ops.simd import (
    ADD_OTHER,
    FLOAT_BYTES,
    HAS_PAIRS,
    MAX_ROWS,
    PANEL,
    RELU,
    START_FROM_C,
    VECTOR_BYTES,
    WIDTH,
    fetch_add,
    give_way,
    load,
    load_float,
    load_shared,
    maximum,
    maximum_or_nan,
    multiply_rows,
    pair,
    relax,
    splat,
    store,
    store_float,
)

# numba knows whole numbers, not members of an enum.
DIRECT, DIRECT_PAIRS = Kind.DIRECT.value, Kind.DIRECT_PAIRS.value
MAX_POOL, HEAD = Kind.MAX_POOL.value, Kind.HEAD.value

LOCAL = -1  # the stride of an operand that lies in the core's own arena

# An operand is an address and the bytes from one model's to the next one's, or LOCAL.
_OPERANDS = ("x", "weight", "bias", "other", "out")
_GEOMETRY = (
    *("kind", "tile", "relu", "images", "height", "width", "channels"),
    *("out_height", "out_width", "out_channels", "kernel_y", "kernel_x"),
    *("stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"),
)
STEP = np.dtype(
    [(f"{name}{part}", np.int64) for name in _OPERANDS for part in ("", "_stride")]
    + [(name, np.int64) for name in _GEOMETRY]
)

DEPTH = 1024  # of a direct product at a time: a panel of it and its rows fit a core's cache
GROUP_BYTES = 256 * 1024  # rows of a direct product that are gathered at a time
SPINS = 512  # of some 40 cycles each, at a barrier before the core is offered to others
GROUP_TILES = 2 * MAX_ROWS  # of Winograd's that are transformed at a time


# Integers that the threads of a call share: what is told to leave, how many models were begun, and
# each team's arrivals at barriers.
STOP, BEGUN, ARRIVALS = range(3)


def can_run(kind: Kind, geometry: Geometry) -> bool:
    """Can the kernel run such a step? The one place that knows what each kernel asks for."""
    whole = geometry.channels % WIDTH == 0  # its pixels are whole vectors
    plain = geometry.dilation == (1, 1)
    if kind == Kind.MAX_POOL:
        return whole and plain
    if kind == Kind.HEAD:
        return whole
    if geometry.out_channels % PANEL != 0:
        return False
    if kind.tile:
        return whole and plain and geometry.kernel == (3, 3) and geometry.stride == (1, 1)
    if kind == Kind.DIRECT_PAIRS and not HAS_PAIRS:
        return False
    if not whole:  # few channels: a row of the kernel is read as one run
        return geometry.dilation[1] == 1
    return kind == Kind.DIRECT or geometry.channels % (2 * WIDTH) == 0


def is_planar(geometry: Geometry) -> bool:
    """Does a direct convolution read its images as `(B, C, H, W)`, not channels-last?"""
    return geometry.channels % WIDTH != 0


def scratch_bytes(step: Any) -> int:
    """An upper bound of what a step needs beside its operands."""
    row = (step["channels"] + step["out_channels"] + WIDTH) * FLOAT_BYTES
    winograd = 36 * (GROUP_TILES * row + 4 * VECTOR_BYTES) + row + PANEL * FLOAT_BYTES
    total = step["kernel_y"] * step["kernel_x"] * step["channels"] + 2 * WIDTH
    padded = (step["height"] + 2 * step["pad_y"] + 1) * (step["width"] + 2 * step["pad_x"])
    longest = total if step["channels"] % WIDTH else min(total, DEPTH)
    rows = max(GROUP_BYTES, MAX_ROWS * longest * FLOAT_BYTES)
    narrow = step["images"] * padded * step["channels"] * FLOAT_BYTES
    direct = total * FLOAT_BYTES + rows + (narrow if step["channels"] % WIDTH else 0)
    head = MAX_ROWS * (PANEL + step["channels"]) * FLOAT_BYTES
    return int(max(winograd, direct, head)) + 4 * VECTOR_BYTES


def _jit(function: Any) -> Any:
    return njit(nogil=True, error_model="numpy")(function)


def _make_multiply() -> Any:
    """`multiply(pairs, rows, ...)`: the product of floats or of pairs for that many rows, one
    branch for each. Where the CPU knows no pairs, no step has any."""
    arguments = "a, b, c, c_stride, depth, start, other, flags, ahead"
    lines, scope = [f"def multiply(pairs, rows, {arguments}):"], {}
    for pairs in (False, True) if HAS_PAIRS else (False,):
        for rows in range(1, MAX_ROWS + 1):
            name = f"product_{rows}_{pairs}"
            scope[name] = multiply_rows(rows, pairs=pairs)
            lines.append(f"    if pairs == {pairs} and rows == {rows}:")
            lines.append(f"        return {name}({arguments})")
    exec("\n".join(lines), scope)
    return scope["multiply"]


_multiply = _jit(_make_multiply())


@_jit
def _as_it_is(low, high):
    return low


_pair = pair if HAS_PAIRS else _as_it_is


@_jit
def _ceil(value, divisor):
    return (value + divisor - 1) // divisor


@_jit
def _gather(step, x, a, first, rows, k, depth):
    """Pack `depth` factors, from the k-th on, of `rows` output pixels, from the first on.

    A factor is an input channel of a tap of the kernel, in the order (kernel_y, kernel_x, channel),
    or a pair of them.
    """
    pairs = step.kind == DIRECT_PAIRS
    at_once = 2 if pairs else 1
    pixels = step.out_height * step.out_width
    for row in range(rows):
        image, pixel = divmod(first + row, pixels)
        out_y, out_x = divmod(pixel, step.out_width)
        block = 0
        while block * WIDTH < depth:
            tap, channel = divmod((k + block * WIDTH) * at_once, step.channels)
            run = min((step.channels - channel) // (WIDTH * at_once), depth // WIDTH - block)
            tap_y, tap_x = divmod(tap, step.kernel_x)
            in_y = out_y * step.stride_y - step.pad_y + tap_y * step.dilation_y
            in_x = out_x * step.stride_x - step.pad_x + tap_x * step.dilation_x
            target = a + (block * rows + row) * VECTOR_BYTES
            if 0 <= in_y < step.height and 0 <= in_x < step.width:
                position = (image * step.height + in_y) * step.width + in_x
                source = x + (position * step.channels + channel) * FLOAT_BYTES
                for index in range(run):
                    at = source + index * at_once * VECTOR_BYTES
                    value = _pair(load(at), load(at + VECTOR_BYTES)) if pairs else load(at)
                    store(target + index * rows * VECTOR_BYTES, value)
            else:
                for index in range(run):
                    store(target + index * rows * VECTOR_BYTES, splat(np.float32(0)))
            block += run


@_jit
def _pad(step, x, padded):
    """Copy planar images with their zero borders around them, for `_gather_narrow`."""
    height, width = step.height + 2 * step.pad_y, step.width + 2 * step.pad_x
    channels = step.channels
    for line in range(step.images * height):
        image, y = divmod(line, height)
        target = padded + line * width * channels * FLOAT_BYTES
        in_y = y - step.pad_y
        for index in range(width * channels):
            store_float(target + index * FLOAT_BYTES, np.float32(0))
        if not 0 <= in_y < step.height:
            continue
        for channel in range(channels):
            source = (
                x + ((image * channels + channel) * step.height + in_y) * step.width * FLOAT_BYTES
            )
            first = target + (step.pad_x * channels + channel) * FLOAT_BYTES
            for index in range(step.width):
                value = load_float(source + index * FLOAT_BYTES)
                store_float(first + index * channels * FLOAT_BYTES, value)


@_jit
def _gather_narrow(step, padded, a, first, rows, line):
    """`_gather` for few channels, whole depth: a row of the kernel is one run of memory.

    Runs are copied in whole vectors, each next one over the surplus of the one before.
    """
    pairs = step.kind == DIRECT_PAIRS
    height, width = step.height + 2 * step.pad_y, step.width + 2 * step.pad_x
    run = step.kernel_x * step.channels
    pixels = step.out_height * step.out_width
    for row in range(rows):
        image, pixel = divmod(first + row, pixels)
        out_y, out_x = divmod(pixel, step.out_width)
        for tap_y in range(step.kernel_y):
            in_y = out_y * step.stride_y + tap_y * step.dilation_y
            position = (image * height + in_y) * width + out_x * step.stride_x
            source = padded + position * step.channels * FLOAT_BYTES
            target = line + tap_y * run * FLOAT_BYTES
            for index in range(_ceil(run, WIDTH)):
                store(target + index * VECTOR_BYTES, load(source + index * VECTOR_BYTES))
        total = step.kernel_y * run
        store_float(line + total * FLOAT_BYTES, np.float32(0))  # what makes an odd one a pair
        for block in range(_ceil(total, 2 * WIDTH if pairs else WIDTH)):
            at = line + block * (2 * VECTOR_BYTES if pairs else VECTOR_BYTES)
            value = _pair(load(at), load(at + VECTOR_BYTES)) if pairs else load(at)
            store(a + (block * rows + row) * VECTOR_BYTES, value)


@_jit
def _direct(step, x, weight, bias, other, out, scratch, part, parts):
    """A convolution as matrix products of gathered rows and packed weights.

    The idea of gathering by blocks: Dukhan, The Indirect Convolution Algorithm, arXiv 1907.02129.
    weight is `(out_channels / PANEL, depth, PANEL)`. A factor of the depth is a float, or a pair of
    bfloat16, of the same size.
    """
    narrow = step.channels % WIDTH != 0
    pairs = step.kind == DIRECT_PAIRS
    total = step.kernel_y * step.kernel_x * step.channels
    line_vectors = _ceil(total, WIDTH) + 2
    total = _ceil(total, 2) if pairs else total
    pixels = step.images * step.out_height * step.out_width
    panels = step.out_channels // PANEL
    row_bytes = step.out_channels * FLOAT_BYTES
    longest = _ceil(total, WIDTH) * WIDTH if narrow else min(total, DEPTH)
    group = max(1, GROUP_BYTES // (longest * FLOAT_BYTES) // MAX_ROWS) * MAX_ROWS
    groups = _ceil(pixels, group)
    group = _ceil(pixels, groups)
    by_panels = groups < 4 * parts and panels >= parts
    group_part, group_parts = (0, 1) if by_panels else (part, parts)
    panel_part, panel_parts = (part, parts) if by_panels else (0, 1)
    line = scratch
    rows_at = scratch + line_vectors * VECTOR_BYTES
    padded = rows_at + group * longest * FLOAT_BYTES
    if narrow:
        _pad(step, x, padded)
    for index in range(group_part, groups, group_parts):
        first = index * group
        count = min(group, pixels - first)
        rows = _ceil(count, _ceil(count, MAX_ROWS))
        for k in range(0, total, longest):
            depth = min(longest, total - k)
            whole = _ceil(depth, WIDTH) * WIDTH * FLOAT_BYTES
            for row in range(0, count, rows):
                own = min(rows, count - row)
                if narrow:
                    _gather_narrow(step, padded, rows_at + row * whole, first + row, own, line)
                else:
                    _gather(step, x, rows_at + row * whole, first + row, own, k, depth)
            flags = 0 if k == 0 else START_FROM_C
            if k + depth == total:
                flags += (ADD_OTHER if other != 0 else 0) + (RELU if step.relu else 0)
            for panel in range(panel_part, panels, panel_parts):
                at = panel * PANEL * FLOAT_BYTES
                factors = weight + (panel * total + k) * PANEL * FLOAT_BYTES
                for row in range(0, count, rows):
                    place = (first + row) * row_bytes + at
                    _multiply(
                        pairs,
                        min(rows, count - row),
                        rows_at + row * whole,
                        factors,
                        out + place,
                        row_bytes,
                        depth,
                        bias + at,
                        other + place,
                        flags,
                        panel_parts * total * PANEL * FLOAT_BYTES,
                    )


# Winograd's minimal filtering F(4x4, 3x3) and F(2x2, 3x3), matrices as in Lavin and Gray, Fast
# Algorithms for Convolutional Neural Networks, arXiv 1509.09308: a line of a patch -> a line of its
# transform, and a line of products -> a line of the output tile.


@_jit
def _input_4(line):
    a, b, c, d, e, f = line
    four, five, two = np.float32(4), np.float32(5), np.float32(2)
    ec, db = e - four * c, d - four * b
    e_c, d_b = e - c, two * (d - b)
    return four * a - five * c + e, ec + db, ec - db, e_c + d_b, e_c - d_b, four * b - five * d + f


@_jit
def _output_4(line):
    a, b, c, d, e, f = line
    two, four, eight = np.float32(2), np.float32(4), np.float32(8)
    plus, minus, plus_2, minus_2 = b + c, b - c, d + e, d - e
    last = minus + eight * minus_2 + f
    return a + plus + plus_2, minus + two * minus_2, plus + four * plus_2, last


@_jit
def _input_2(line):
    a, b, c, d = line
    return a - c, b + c, c - b, b - d


@_jit
def _output_2(line):
    a, b, c, d = line
    return a + b + c, b - c - d


@_jit
def _load_2(at, step):
    return load(at), load(at + step)


@_jit
def _load_4(at, step):
    return load(at), load(at + step), load(at + 2 * step), load(at + 3 * step)


@_jit
def _load_6(at, step):
    a, b, c, d = _load_4(at, step)
    return a, b, c, d, load(at + 4 * step), load(at + 5 * step)


@_jit
def _column_4(pixels, x, channel):
    return (
        load(pixels[x] + channel),
        load(pixels[4 + x] + channel),
        load(pixels[8 + x] + channel),
        load(pixels[12 + x] + channel),
    )


@_jit
def _column_6(pixels, x, channel):
    return (
        load(pixels[x] + channel),
        load(pixels[6 + x] + channel),
        load(pixels[12 + x] + channel),
        load(pixels[18 + x] + channel),
        load(pixels[24 + x] + channel),
        load(pixels[30 + x] + channel),
    )


@_jit
def _store_2(at, step, line):
    a, b = line
    store(at, a)
    store(at + step, b)


@_jit
def _store_4(at, step, line):
    a, b, c, d = line
    store(at, a)
    store(at + step, b)
    store(at + 2 * step, c)
    store(at + 3 * step, d)


@_jit
def _store_6(at, step, line):
    a, b, c, d, e, f = line
    _store_4(at, step, (a, b, c, d))
    store(at + 4 * step, e)
    store(at + 5 * step, f)


def _make_input_tile(patch: int, transform: Any, column: Any, load_line: Any, put: Any) -> Any:
    @_jit
    def input_tile(pixels, channels, target, channel_step, plane, work):
        """Transform a patch, given by its pixels' addresses; its (y, x) goes to plane y, x."""
        for channel in range(0, channels * FLOAT_BYTES, VECTOR_BYTES):
            for x in range(patch):
                line = transform(column(pixels, x, channel))
                put(work + x * VECTOR_BYTES, patch * VECTOR_BYTES, line)
            for y in range(patch):
                line = transform(load_line(work + y * patch * VECTOR_BYTES, VECTOR_BYTES))
                put(target + y * patch * plane, plane, line)
            target += channel_step

    return input_tile


def _make_output_tile(tile: int, transform: Any, load_line: Any, put: Any) -> Any:
    patch = tile + 2

    @_jit
    def output_tile(step, source, plane, bias, other, out, y0, x0, work):
        """Transform a tile's products back, add bias and other, and write what is in the image."""
        row, pixel = (
            step.out_width * step.out_channels * FLOAT_BYTES,
            step.out_channels * FLOAT_BYTES,
        )
        height, width = min(tile, step.out_height - y0), min(tile, step.out_width - x0)
        zero = splat(np.float32(0))
        for channel in range(0, step.out_channels * FLOAT_BYTES, VECTOR_BYTES):
            for x in range(patch):
                line = transform(load_line(source + channel + x * plane, patch * plane))
                put(work + x * VECTOR_BYTES, patch * VECTOR_BYTES, line)
            own_bias = load(bias + channel)
            for y in range(height):
                line = transform(load_line(work + y * patch * VECTOR_BYTES, VECTOR_BYTES))
                at = work + patch * patch * VECTOR_BYTES
                put(at, VECTOR_BYTES, line)
                for x in range(width):
                    place = (y0 + y) * row + (x0 + x) * pixel + channel
                    value = load(at + x * VECTOR_BYTES) + own_bias
                    if other != 0:
                        value = value + load(other + place)
                    if step.relu:
                        value = maximum(value, zero)
                    store(out + place, value)

    return output_tile


_input_tile_4 = _make_input_tile(6, _input_4, _column_6, _load_6, _store_6)
_input_tile_2 = _make_input_tile(4, _input_2, _column_4, _load_4, _store_4)
_output_tile_4 = _make_output_tile(4, _output_4, _load_6, _store_4)
_output_tile_2 = _make_output_tile(2, _output_2, _load_4, _store_2)


@_jit
def _winograd(step, x, weight, bias, other, out, scratch, part, parts):
    """A 3x3 convolution at stride 1: tiles transformed, one product a plane, transformed back.

    weight is `((tile + 2) ** 2, out_channels / PANEL, channels, PANEL)`.
    """
    tile = step.tile
    patch = tile + 2
    planes = patch * patch
    tiles_y, tiles_x = _ceil(step.out_height, tile), _ceil(step.out_width, tile)
    tiles = step.images * tiles_y * tiles_x
    group = _ceil(tiles, max(parts, _ceil(tiles, GROUP_TILES)))
    panels = step.out_channels // PANEL
    # Planes lie one line more than their size apart, lest all fall into one set of the cache.
    row_in = step.channels * FLOAT_BYTES
    row_out = step.out_channels * FLOAT_BYTES + VECTOR_BYTES
    plane_in = group * row_in + VECTOR_BYTES
    plane_out = group * row_out + VECTOR_BYTES
    work = scratch
    zeros = work + 2 * planes * VECTOR_BYTES
    zero_bytes = max(row_in, PANEL * FLOAT_BYTES)
    inputs = zeros + zero_bytes
    products = inputs + planes * plane_in
    for at in range(0, zero_bytes, VECTOR_BYTES):
        store(zeros + at, splat(np.float32(0)))
    pixels = np.empty(36, np.int64)
    image_in = step.height * step.width * step.channels * FLOAT_BYTES
    image_out = step.out_height * step.out_width * step.out_channels * FLOAT_BYTES
    for first in range(part * group, tiles, parts * group):
        count = min(group, tiles - first)
        rows = _ceil(count, _ceil(count, MAX_ROWS))
        for index in range(count):
            image, place = divmod(first + index, tiles_y * tiles_x)
            tile_y, tile_x = divmod(place, tiles_x)
            for y in range(patch):
                for x_ in range(patch):
                    in_y, in_x = tile_y * tile - step.pad_y + y, tile_x * tile - step.pad_x + x_
                    inside = 0 <= in_y < step.height and 0 <= in_x < step.width
                    at = x + image * image_in + (in_y * step.width + in_x) * row_in
                    pixels[y * patch + x_] = at if inside else zeros
            block, row = divmod(index, rows)
            own = min(rows, count - block * rows)
            target = inputs + block * rows * row_in + row * VECTOR_BYTES
            if tile == 4:
                _input_tile_4(pixels, step.channels, target, own * VECTOR_BYTES, plane_in, work)
            else:
                _input_tile_2(pixels, step.channels, target, own * VECTOR_BYTES, plane_in, work)
        for plane in range(planes):
            for panel in range(panels):
                factors = weight + (plane * panels + panel) * step.channels * PANEL * FLOAT_BYTES
                at = products + plane * plane_out + panel * PANEL * FLOAT_BYTES
                for row in range(0, count, rows):
                    _multiply(
                        False,
                        min(rows, count - row),
                        inputs + plane * plane_in + row * row_in,
                        factors,
                        at + row * row_out,
                        row_out,
                        step.channels,
                        zeros,  # what the products start from
                        0,
                        0,
                        step.channels * PANEL * FLOAT_BYTES,
                    )
        for index in range(count):
            image, place = divmod(first + index, tiles_y * tiles_x)
            tile_y, tile_x = divmod(place, tiles_x)
            source = products + index * row_out
            target = out + image * image_out
            added = other + image * image_out if other != 0 else 0
            y0, x0 = tile_y * tile, tile_x * tile
            if tile == 4:
                _output_tile_4(step, source, plane_out, bias, added, target, y0, x0, work)
            else:
                _output_tile_2(step, source, plane_out, bias, added, target, y0, x0, work)


@_jit
def _max_pool(step, x, out, part, parts):
    lowest = splat(np.float32(-np.inf))
    row = step.channels * FLOAT_BYTES
    for line in range(part, step.images * step.out_height, parts):
        image, out_y = divmod(line, step.out_height)
        for out_x in range(step.out_width):
            target = out + (line * step.out_width + out_x) * row
            y0, x0 = out_y * step.stride_y - step.pad_y, out_x * step.stride_x - step.pad_x
            for channel in range(0, row, VECTOR_BYTES):
                best = lowest
                for y in range(max(y0, 0), min(y0 + step.kernel_y, step.height)):
                    for x_ in range(max(x0, 0), min(x0 + step.kernel_x, step.width)):
                        position = (image * step.height + y) * step.width + x_
                        best = maximum_or_nan(load(x + position * row + channel), best)
                store(target + channel, best)


@_jit
def _head(step, x, weight, bias, out, scratch, part, parts):
    """The mean over all pixels, then a linear layer: `(B, H, W, C)` -> `(B, out_channels)`.

    weight is `(panels, C, PANEL)` and bias `(panels * PANEL)`, filled up with zeros.
    """
    means = scratch + MAX_ROWS * PANEL * FLOAT_BYTES
    pixels = step.height * step.width
    row_bytes = step.channels * FLOAT_BYTES
    for first in range(0, step.images, MAX_ROWS):
        rows = min(MAX_ROWS, step.images - first)
        for row in range(rows):
            source = x + (first + row) * pixels * row_bytes
            for channel in range(0, row_bytes, VECTOR_BYTES):
                total = load(source + channel)
                for pixel in range(1, pixels):
                    total = total + load(source + pixel * row_bytes + channel)
                target = means + channel * rows + row * VECTOR_BYTES
                store(target, np.float32(1 / pixels) * total)
        for panel in range(part, _ceil(step.out_channels, PANEL), parts):
            factors = weight + panel * row_bytes * PANEL
            start = bias + panel * PANEL * FLOAT_BYTES
            panel_bytes = PANEL * FLOAT_BYTES
            ahead = parts * row_bytes * PANEL
            depth = step.channels
            _multiply(False, rows, means, factors, scratch, panel_bytes, depth, start, 0, 0, ahead)
            for row in range(rows):
                target = out + ((first + row) * step.out_channels + panel * PANEL) * FLOAT_BYTES
                for column in range(min(PANEL, step.out_channels - panel * PANEL)):
                    value = load_float(scratch + (row * PANEL + column) * FLOAT_BYTES)
                    store_float(target + column * FLOAT_BYTES, value)


@_jit
def _address(base, stride, model, arena):
    return arena + base if stride == LOCAL else base + stride * model


@_jit
def _execute(step, model, arena, scratch, part, parts):
    x = _address(step.x, step.x_stride, model, arena)
    out = _address(step.out, step.out_stride, model, arena)
    other = 0
    if step.other != 0 or step.other_stride == LOCAL:
        other = _address(step.other, step.other_stride, model, arena)
    weight = step.weight + step.weight_stride * model
    bias = step.bias + step.bias_stride * model
    if step.kind == DIRECT or step.kind == DIRECT_PAIRS:
        _direct(step, x, weight, bias, other, out, scratch, part, parts)
    elif step.kind == MAX_POOL:
        _max_pool(step, x, out, part, parts)
    elif step.kind == HEAD:
        _head(step, x, weight, bias, out, scratch, part, parts)
    else:
        _winograd(step, x, weight, bias, other, out, scratch, part, parts)


@_jit
def _wait(state, counter, arrivals):
    """Arrive, and spin until all have: steps are shorter than it takes to wake a thread.

    One that has no core of its own is let in after some microseconds. False where the call is over
    because one of its parts will not come.
    """
    fetch_add(counter, 1)
    spins = 0
    while load_shared(counter) < arrivals:
        if load_shared(state + 8 * STOP) != 0:
            return False
        spins += 1
        if spins % SPINS == 0:
            give_way()
        else:
            relax()
    return True


@_jit
def _team_size(left, parts):
    """Threads for each of `left` models, fewer than threads: all that there are, one model after
    another, where teams for every model at once would leave a quarter of them idle."""
    return parts // left if 4 * (parts % left) < parts else parts


def _make_run(sources: str):
    """`run`, compiled once and kept on disk as long as `sources` stay what they are.

    numba by itself would only ask whether this file has changed; it does ask for what a function
    closes over.
    """

    def run(steps, arenas, scratches, state, part, parts, num_models):
        """Take models through all steps until none is left; called once by each of `parts` threads.

        First each thread takes models by itself. When fewer are left than threads, threads share
        them step by step, in teams that use the arena of their first member.

        arenas, scratches: an address for each part. state: the address of `ARRIVALS + parts`
        integers that are 0 when the first part starts. Once STOP is not 0 every part leaves early.
        """
        sources  # noqa: B018
        alone = num_models // parts * parts
        size = _team_size(max(1, num_models - alone), parts)
        team, arrivals = part // size, 0
        model = fetch_add(state + 8 * BEGUN, 1)
        together = model >= alone
        if together:
            model = alone + team
        while model < num_models and load_shared(state + 8 * STOP) == 0:
            for index in range(len(steps)):
                arena, member, members = arenas[part], 0, 1
                if together:
                    arena, member, members = arenas[team * size], part % size, size
                    arrivals += size
                    if not _wait(state, state + 8 * (ARRIVALS + team), arrivals):
                        return
                _execute(steps[index], model, arena, scratches[part], member, members)
            if together:
                model += parts // size
            else:
                model = fetch_add(state + 8 * BEGUN, 1)
                if model >= alone:
                    model, together = alone + team, True

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(run)
    except RuntimeError:  # no folder that numba could write its cache to
        return njit(**options)(run)


# Every file that the code comes from.
_FILES = (__file__, simd.__file__, operation.__file__)
run = _make_run(hashlib.sha256(b"".join(Path(name).read_bytes() for name in _FILES)).hexdigest())
