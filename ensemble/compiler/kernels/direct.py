# mypy: ignore-errors
# numba infers the types of these functions from the arguments of `run`.
"""Direct convolution as GEMM on packed rows (im2col by blocks), in float32 or bfloat16.

Packing by blocks instead of the whole image: Dukhan, The Indirect Convolution Algorithm, arXiv
1907.02129.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ensemble.compiler.codegen.gemm import ADD_OTHER, RELU, START_FROM_C
from ensemble.compiler.codegen.simd import (
    FLOAT_BYTES,
    HAS_BF16_DOT,
    MAX_ROWS,
    PANEL,
    PANEL_VECTORS,
    VECTOR_BYTES,
    WIDTH,
    load,
    load_float,
    splat,
    store,
    store_float,
    to_bf16,
)
from ensemble.compiler.kernels.activation import NONE, activate
from ensemble.compiler.kernels.kernel import (
    Kernel,
    ceil,
    cost,
    jit,
    jit_inline,
    multiply,
    panels_of,
)
from ensemble.compiler.planning.step import Geometry

DEPTH = 1024  # of the GEMM at a time (KC): a panel and its rows fit a core's cache
GROUP_BYTES = 256 * 1024  # of rows that are packed at a time
PANEL_BYTES = PANEL * FLOAT_BYTES
LAST = 16  # a further flag of the microkernel's: the sums are complete, so the epilogue applies
FLOATS, BF16 = 1, 2  # variants: how many numbers an element of the GEMM holds


def is_nchw(geometry: Geometry) -> bool:
    """Does the kernel read images in NCHW, not NHWC?"""
    return geometry.channels % WIDTH != 0


def _can_run(geometry: Geometry) -> bool:
    # In NCHW a row of the filter is read as one contiguous run.
    is_readable = not is_nchw(geometry) or geometry.dilation[1] == 1
    return is_readable and geometry.out_channels % WIDTH == 0 and geometry.groups == 1


def _can_run_bf16(geometry: Geometry) -> bool:
    return HAS_BF16_DOT and _can_run(geometry)


def _cost(geometry: Geometry, at_once: int = FLOATS) -> float:
    pixels = geometry.images * geometry.out_size[0] * geometry.out_size[1]
    factors = geometry.kernel[0] * geometry.kernel[1] * geometry.channels * geometry.out_channels
    return cost(products=pixels * factors // at_once, weight_bytes=4 * factors // at_once)


def _cost_bf16(geometry: Geometry) -> float:
    return _cost(geometry, BF16)


def _scratch_bytes(geometry: Geometry) -> int:
    total = geometry.kernel[0] * geometry.kernel[1] * geometry.channels + 2 * WIDTH
    nchw = is_nchw(geometry)
    longest = total if nchw else min(total, DEPTH)
    rows = max(GROUP_BYTES, MAX_ROWS * longest * FLOAT_BYTES)
    height = geometry.size[0] + 2 * geometry.padding[0] + 1
    width = geometry.size[1] + 2 * geometry.padding[1]
    padded = geometry.images * height * width * geometry.channels * FLOAT_BYTES
    return total * FLOAT_BYTES + rows + (padded if nchw else 0) + 4 * VECTOR_BYTES


def _empty(weight: Tensor) -> Tensor:
    """`(N, K / PANEL, R * S * C, PANEL)`, the last panel padded with zeros."""
    num_models, out_channels, *rest = weight.shape
    depth = rest[0] * rest[1] * rest[2]
    shape = (num_models, panels_of(out_channels), depth, PANEL)
    return weight.new_empty(shape, dtype=torch.float32)


def _empty_bf16(weight: Tensor) -> Tensor:
    """`(N, K / PANEL, R * S * C / 2, PANEL, 2)`, an odd depth padded with zeros."""
    num_models, out_channels, *rest = weight.shape
    half = -(-rest[0] * rest[1] * rest[2] // 2)
    shape = (num_models, panels_of(out_channels), half, PANEL, 2)
    return weight.new_empty(shape, dtype=torch.bfloat16)


def _pack(weight: Tensor, target: Tensor) -> None:
    for panel, rows in enumerate(weight.split(PANEL)):
        target[panel].copy_(_factors(rows))


def _pack_bf16(weight: Tensor, target: Tensor) -> None:
    for panel, rows in enumerate(weight.split(PANEL)):
        factors = _factors(rows)
        even = functional.pad(factors, (0, 0, 0, len(factors) % 2))
        target[panel].copy_(even.unflatten(0, (-1, 2)).mT)


def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    out_channels, channels, rows, columns = shape
    factors = packed.mT.flatten(0, 1)[:out_channels].float()
    return factors.unflatten(1, (rows, columns, channels)).permute(0, 3, 1, 2).contiguous()


def _unpack_bf16(packed: Tensor, shape: Sequence[int]) -> Tensor:
    factors = packed.mT.flatten(1, 2)
    return _unpack(factors[:, : prod(shape[1:])], shape)


def _factors(rows: Tensor) -> Tensor:
    """`(PANEL, C, R, S)`, or fewer rows -> `(R * S * C, PANEL)`."""
    factors = rows.permute(2, 3, 1, 0).flatten(0, 2)
    return functional.pad(factors, (0, PANEL - len(rows)))


@jit
def _first_of(low, high):
    return low


_to_bf16 = to_bf16 if HAS_BF16_DOT else _first_of


@jit
def _find(step, x, image, out_y, out_x, tap):
    """The address of the input pixel of a tap of an output pixel; 0 outside the image."""
    tap_y, tap_x = divmod(tap, step.kernel_x)
    in_y = out_y * step.stride_y - step.pad_y + tap_y * step.dilation_y
    in_x = out_x * step.stride_x - step.pad_x + tap_x * step.dilation_x
    if 0 <= in_y < step.height and 0 <= in_x < step.width:
        position = (image * step.height + in_y) * step.width + in_x
        return x + position * step.channels * FLOAT_BYTES
    return 0


@jit
def _half(step, x, image, out_y, out_x, tap, channel):
    """A vector of a tap's channels; zeros outside the image and after the last tap."""
    found = 0
    if tap < step.kernel_y * step.kernel_x:
        found = _find(step, x, image, out_y, out_x, tap)
    return load(found + channel * FLOAT_BYTES) if found != 0 else splat(np.float32(0))


@jit
def _first(step, row):
    """Image, y and x of an output pixel."""
    image, pixel = divmod(row, step.out_height * step.out_width)
    out_y, out_x = divmod(pixel, step.out_width)
    return image, out_y, out_x


@jit
def _next(step, image, out_y, out_x):
    """The same of the next pixel, without the divisions, which cost as much as a short copy."""
    out_x += 1
    if out_x == step.out_width:
        out_y, out_x = out_y + 1, 0
        if out_y == step.out_height:
            image, out_y = image + 1, 0
    return image, out_y, out_x


@jit
def _pack_vectors(bf16, source, target, blocks, target_stride):
    """Pack so many contiguous vectors; zeros where source is 0."""
    if source == 0:
        for index in range(blocks):
            store(target + index * target_stride, splat(np.float32(0)))
    elif bf16:
        for index in range(blocks):
            at = source + index * 2 * VECTOR_BYTES
            store(target + index * target_stride, _to_bf16(load(at), load(at + VECTOR_BYTES)))
    else:
        for index in range(blocks):
            store(target + index * target_stride, load(source + index * VECTOR_BYTES))


@jit
def _pack_rows(step, x, a, first, rows, k, depth):
    """im2col: pack `depth` elements, from the k-th on, of `rows` output pixels, from the first on.

    An element is an input channel of a tap, in the order (kernel_y, kernel_x, channel), or two of
    them in bfloat16: there a tap may end in the middle of a vector.
    """
    bf16 = step.variant == BF16
    at_once = 2 if bf16 else 1
    blocks, stride = ceil(depth, WIDTH), rows * VECTOR_BYTES
    dense = step.channels % (at_once * WIDTH) == 0 and _is_dense(step)
    image, out_y, out_x = _first(step, first)
    for row in range(rows):
        block, target = 0, a + row * VECTOR_BYTES
        if dense:
            source = x + ((first + row) * step.channels + k * at_once) * FLOAT_BYTES
            _pack_vectors(bf16, source, target, blocks, stride)
            continue
        while block < blocks:
            tap, channel = divmod((k + block * WIDTH) * at_once, step.channels)
            run = min((step.channels - channel) // (WIDTH * at_once), blocks - block)
            if run == 0:
                low = _half(step, x, image, out_y, out_x, tap, channel)
                high = _half(step, x, image, out_y, out_x, tap + 1, np.int64(0))
                store(target + block * stride, _to_bf16(low, high))
                block += 1
                continue
            found = _find(step, x, image, out_y, out_x, tap)
            source = found + channel * FLOAT_BYTES if found != 0 else found
            _pack_vectors(bf16, source, target + block * stride, run, stride)
            block += run
        image, out_y, out_x = _next(step, image, out_y, out_x)


@jit
def _is_dense(step):
    """Is it a pointwise convolution at stride 1, so that x is the im2col matrix?"""
    single = step.kernel_y == step.kernel_x == step.stride_y == step.stride_x == 1
    return single and step.pad_y == step.pad_x == 0


@jit
def _pad(step, x, padded):
    """Copy NCHW images to NHWC with zero padding, for `_pack_narrow_rows`."""
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


@jit
def _pack_narrow_rows(step, padded, a, first, rows, line):
    """`_pack_rows` for few channels, whole depth: a row of the filter is one contiguous run.

    Runs are copied in whole vectors; each overwrites the excess of the one before.
    """
    bf16 = step.variant == BF16
    height, width = step.height + 2 * step.pad_y, step.width + 2 * step.pad_x
    run = step.kernel_x * step.channels
    image, out_y, out_x = _first(step, first)
    for row in range(rows):
        for tap_y in range(step.kernel_y):
            in_y = out_y * step.stride_y + tap_y * step.dilation_y
            position = (image * height + in_y) * width + out_x * step.stride_x
            source = padded + position * step.channels * FLOAT_BYTES
            target = line + tap_y * run * FLOAT_BYTES
            for index in range(ceil(run, WIDTH)):
                store(target + index * VECTOR_BYTES, load(source + index * VECTOR_BYTES))
        total = step.kernel_y * run
        store_float(line + total * FLOAT_BYTES, np.float32(0))  # pads an odd depth
        for block in range(ceil(total, 2 * WIDTH if bf16 else WIDTH)):
            at = line + block * (2 * VECTOR_BYTES if bf16 else VECTOR_BYTES)
            value = _to_bf16(load(at), load(at + VECTOR_BYTES)) if bf16 else load(at)
            store(a + (block * rows + row) * VECTOR_BYTES, value)
        image, out_y, out_x = _next(step, image, out_y, out_x)


@jit
def _pack_group(step, x, padded, line, rows_at, first, count, rows, k, depth):
    """Pack `count` output pixels, elements from the k-th on, in blocks of `rows`."""
    whole = ceil(depth, WIDTH) * VECTOR_BYTES
    for row in range(0, count, rows):
        block, target = min(rows, count - row), rows_at + row * whole
        if padded != 0:
            _pack_narrow_rows(step, padded, target, first + row, block, line)
        else:
            _pack_rows(step, x, target, first + row, block, k, depth)


@jit_inline
def _multiply_group(
    step, rows_at, factors, columns, out, other, start, count, rows, depth, flags, ahead
):
    """Packed rows times one panel of weights, or its first vectors; `out` and `other` are those of
    the first pixel."""
    whole = ceil(depth, WIDTH) * VECTOR_BYTES
    row_bytes = step.out_channels * FLOAT_BYTES
    bf16 = step.variant == BF16
    for row in range(0, count, rows):
        block, place = min(rows, count - row), row * row_bytes
        a, c, added = rows_at + row * whole, out + place, other + place
        multiply(bf16, columns, block, a, factors, c, row_bytes, depth, start, added, flags, ahead)
        if flags >= LAST and step.activation != NONE:
            activate(step.activation, step.scalar, c, c, row_bytes, block, columns)


@jit
def _plan(step, parts):
    """The blocking: depth, depth at a time, pixels of a group, groups, whether parts divide panels.

    With few groups each part packs all pixels, and multiplies by its own panels.
    """
    total = step.kernel_y * step.kernel_x * step.channels
    nchw = step.channels % WIDTH != 0
    total = ceil(total, step.variant)
    pixels = step.images * step.out_height * step.out_width
    longest = ceil(total, WIDTH) * WIDTH
    if not nchw:
        longest = min(longest, DEPTH)
    group = max(1, GROUP_BYTES // (longest * FLOAT_BYTES) // MAX_ROWS) * MAX_ROWS
    groups = ceil(pixels, group)
    group = min(group, ceil(ceil(pixels, groups), MAX_ROWS) * MAX_ROWS)  # of whole blocks
    groups = ceil(pixels, group)
    by_panels = groups < 4 * parts and ceil(step.out_channels, PANEL) >= parts
    return total, longest, group, groups, by_panels


@jit
def _body(step, x, weight, bias, other, out, scratch, part, parts):
    """Groups of pixels; for each, blocks of the depth: pack once, then multiply by all panels.

    weight is `(out_channels / PANEL, depth, PANEL)`. An element of the depth is a float, or two
    bfloat16.
    """
    nchw = step.channels % WIDTH != 0
    total, longest, group, groups, by_panels = _plan(step, parts)
    pixels = step.images * step.out_height * step.out_width
    group_part, group_parts = (0, 1) if by_panels else (part, parts)
    panel_part, panel_parts = (part, parts) if by_panels else (0, 1)
    line_vectors = ceil(step.kernel_y * step.kernel_x * step.channels, WIDTH) + 2
    rows_at = scratch + line_vectors * VECTOR_BYTES
    padded = rows_at + group * longest * FLOAT_BYTES if nchw else 0
    if nchw:
        _pad(step, x, padded)
    for index in range(group_part, groups, group_parts):
        first = index * group
        count = min(group, pixels - first)
        rows = ceil(count, ceil(count, MAX_ROWS))
        for k in range(0, total, longest):
            depth = min(longest, total - k)
            _pack_group(step, x, padded, scratch, rows_at, first, count, rows, k, depth)
            flags = 0 if k == 0 else START_FROM_C
            if k + depth == total:
                flags += LAST + (ADD_OTHER if other != 0 else 0) + (RELU if step.relu else 0)
            ahead = panel_parts * total * PANEL_BYTES
            for panel in range(panel_part, ceil(step.out_channels, PANEL), panel_parts):
                place = first * step.out_channels * FLOAT_BYTES + panel * PANEL_BYTES
                c, added, start = out + place, other + place, bias + panel * PANEL_BYTES
                b = weight + (panel * total + k) * PANEL_BYTES
                columns = min(PANEL_VECTORS, step.out_channels // WIDTH - panel * PANEL_VECTORS)
                _multiply_group(
                    step, rows_at, b, columns, c, added, start, count, rows, depth, flags, ahead
                )


_TRAITS = {"fuses_relu": True, "fuses_activations": True, "is_row_wise": True}
DIRECT = Kernel(_body, _can_run, _scratch_bytes, FLOATS, _empty, _pack, _unpack, _cost, **_TRAITS)
DIRECT_BF16 = Kernel(
    _body,
    _can_run_bf16,
    _scratch_bytes,
    BF16,
    _empty_bf16,
    _pack_bf16,
    _unpack_bf16,
    _cost_bf16,
    **_TRAITS,
)
