"""Row tiling (layer fusion): large intermediate values are computed a few rows at a time.

A 1x1 convolution that expands the channels by six, the grouped convolution that reads them and the
projection after it would each write or read megabytes. A tiling runs such steps tile by tile: the
intermediate rows are read while they are still in the core's cache. Each tile of a step is a step
itself, of fewer rows, so the kernels need no support for tiling. Rows that the next tile reads
again are copied to where that tile begins (Alwani and others, Fused-Layer CNN Accelerators, MICRO
2016, who call it reuse).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import FLOAT_BYTES
from ensemble.compiler.planning.step import Geometry, Kind, Step


@dataclass(frozen=True)
class CacheSizes:
    """What a core's cache holds.

    Attributes:
        large_bytes: a larger value has left it before the next step reads it.
        tile_bytes: of the intermediate values of a tile.
    """

    large_bytes: int
    tile_bytes: int


CACHE = CacheSizes(large_bytes=1024 * 1024, tile_bytes=384 * 1024)  # of 1 MB a core


@dataclass(frozen=True)
class Tiling:
    """The steps from `first` to before `end`, in tiles of `rows` output rows of the last one."""

    first: int
    end: int
    rows: int


def select_tilings(
    steps: Sequence[Step], internal: Collection[int], *, cache: CacheSizes | None = None
) -> list[Tiling]:
    """The tilings that pay.

    Args:
        steps: in order.
        internal: values that are neither inputs nor outputs of the program.
        cache: default: `CACHE`.
    """
    cache = cache or CACHE
    readers = Counter(value for step in steps for value in step.reads)

    def follows(before: Step, after: Step) -> bool:
        is_large = prod(before.geometry.out_shape[1:]) * FLOAT_BYTES > cache.large_bytes
        is_only_reader = after.x == before.out and readers[before.out] == 1
        return is_large and is_only_reader and before.out in internal

    can_tile = [_is_row_wise(step, internal) for step in steps]
    ends = [
        index + 1
        for index, (before, after) in enumerate(pairwise(steps))
        if not (can_tile[index] and can_tile[index + 1] and follows(before, after))
    ]
    bounds = pairwise([0, *ends, len(steps)])
    chains = ((first, end) for first, end in bounds if end - first > 1)
    tilings = (
        Tiling(first, end, _tile_rows(steps[first:end], cache.tile_bytes)) for first, end in chains
    )
    return [tiling for tiling in tilings if tiling.rows]


def tile_steps(
    steps: Sequence[Step], table: np.ndarray, tilings: Sequence[Tiling]
) -> tuple[np.ndarray, dict[int, int]]:
    """The step table with the steps of each tiling expanded to tiles.

    Also where each step that is not tiled stands: index in the result -> index in `table`.
    """
    rows: list[np.void] = []
    untiled: dict[int, int] = {}
    begin = 0
    for tiling in tilings:
        for index in range(begin, tiling.first):
            untiled[len(rows)] = index
            rows.append(table[index])
        chain = steps[tiling.first : tiling.end]
        for image in range(chain[0].geometry.images):
            for tile in _tiles(chain, tiling.rows):
                rows += _table_rows(table[tiling.first + tile.index], chain, tile, image)
        begin = tiling.end
    for index in range(begin, len(table)):
        untiled[len(rows)] = index
        rows.append(table[index])
    return np.array(rows, table.dtype), untiled


@dataclass(frozen=True)
class Tile:
    """One tile of one step of a chain.

    `geometry` is None if the tile before has computed all rows. `top`: the first row it reads.
    `begin`: the first row it writes. `reused`: how many rows of the tile before it copies to its
    beginning, and the row of that tile where they start.
    """

    index: int
    geometry: Geometry | None
    top: int
    begin: int
    reused: tuple[int, int]


def _tiles(chain: Sequence[Step], rows: int) -> Iterator[Tile]:
    """The steps of a chain in tiles of so many output rows of the last step."""
    height = chain[-1].geometry.out_size[0]
    held = [(0, 0)] * len(chain)  # the rows of each step's output that are in memory
    for first in range(0, height, rows):
        tiles, need = list[Tile](), (first, min(first + rows, height))
        for index in reversed(range(len(chain))):
            (low, high), (start, end) = need, held[index]
            begin = min(max(low, end), high)
            held[index], reused = need, (begin - low, low - start)
            if begin == high:
                tiles.append(Tile(index, None, 0, begin, reused))
                break
            whole = chain[index].geometry
            top, bottom = _rows_read(whole, begin, high)
            geometry = replace(
                whole,
                images=1,
                size=(bottom - max(top, 0), whole.size[1]),
                out_size=(high - begin, whole.out_size[1]),
                padding=(max(-top, 0), whole.padding[1]),
            )
            need = max(top, 0), bottom
            tiles.append(Tile(index, geometry, need[0], begin, reused))
        yield from reversed(tiles)


def _rows_read(geometry: Geometry, begin: int, end: int) -> tuple[int, int]:
    """The input rows of these output rows; the first may lie above the image."""
    top = begin * geometry.stride[0] - geometry.padding[0]
    reach = (end - begin - 1) * geometry.stride[0] + (geometry.kernel[0] - 1) * geometry.dilation[0]
    return top, min(top + reach + 1, geometry.size[0])


def _table_rows(row: np.void, chain: Sequence[Step], tile: Tile, image: int) -> Iterator[np.void]:
    """The copy of the reused rows, if there are any, and the tile itself.

    The chain's input and output are whole values; an intermediate tile lies where the whole value
    would begin.
    """
    step, tiled = chain[tile.index], row.copy()
    whole, (count, distance) = step.geometry, tile.reused
    line = whole.size[1] * whole.channels * FLOAT_BYTES
    out_line = whole.out_size[1] * whole.out_channels * FLOAT_BYTES
    at = (image * whole.out_size[0] + tile.begin) * out_line
    if count and distance and tile.index < len(chain) - 1:
        yield _copy_rows(row, whole, count, distance * out_line)
    if tile.geometry is None:
        return
    kernels.fill_geometry(tiled, tile.geometry)
    if tile.index == 0:
        tiled["x"] += (image * whole.size[0] + tile.top) * line
    if step.kind == Kind.SCALE:  # by one pixel of each image
        tiled["other"] += image * whole.channels * FLOAT_BYTES
    elif step.other is not None:
        tiled["other"] += at
    if tile.index == len(chain) - 1:
        tiled["out"] += at
    else:
        tiled["out"] += count * out_line
    yield tiled


def _copy_rows(row: np.void, geometry: Geometry, rows: int, distance: int) -> np.void:
    """Copy so many rows of a step's output, `distance` bytes in, to its beginning."""
    copy: np.void = np.zeros(1, row.dtype)[0]
    size, channels = (rows, geometry.out_size[1]), geometry.out_channels
    one, none = (1, 1), (0, 0)
    kernels.fill_geometry(copy, Geometry(1, channels, size, channels, size, one, one, none, one))
    copy["kind"], copy["unpadded_channels"] = Kind.COPY, channels
    copy["x"], copy["x_stride"] = row["out"] + distance, row["out_stride"]
    copy["out"], copy["out_stride"] = row["out"], row["out_stride"]
    return copy


def _is_row_wise(step: Step, internal: Collection[int]) -> bool:
    """Does a step compute rows independently, with all its values in the core's arena?"""
    values = *step.reads, step.out
    row_wise = kernels.KERNELS[step.kind].is_row_wise and not kernels.is_nchw(step.geometry)
    return row_wise and all(value in internal for value in values)


def _tile_rows(chain: Sequence[Step], tile_bytes: int) -> int:
    """Rows of a tile, as many as the cache holds; 0 if the weights would be read too often."""
    height = chain[-1].geometry.out_size[0]
    between = sum(prod(step.geometry.out_shape[1:]) for step in chain[:-1]) * FLOAT_BYTES
    weights = sum(_weight_bytes(step) for step in chain)
    rows = max(1, height * tile_bytes // between)
    tiles = -(-height // rows)
    rows = -(-height // tiles)
    fits = all(not tile.geometry or tile.geometry.size[0] > 0 for tile in _tiles(chain, rows))
    return rows if fits and (tiles - 1) * weights <= between else 0


def _weight_bytes(step: Step) -> int:
    """Of one model."""
    weight = step.weight
    return 0 if weight is None else weight[0].numel() * weight.element_size()
