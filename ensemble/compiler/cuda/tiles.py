"""Tiles of the implicit GEMM: the default for a problem, and those that the autotuner may try."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from ensemble.compiler.cuda.problem import ConvProblem

MAX_SPLITS = 8
# Blocks of the depth that a split has at least: fewer do not fill the pipeline of loads.
MIN_BLOCKS_PER_SPLIT = 4
MANY_ROWS, FEW_ROWS = 512, 32  # of a product
# The largest tile in rows and columns, the deepest block, and the most stages, by the format of the
# products: larger ones spill registers (see the tests of the machine code). The largest takes 8
# warps, as do 128 rows: two warpgroups of an H100, which multiply 64 rows each.
LARGEST = {
    "16 bits": ((128, 128), 64, 4),
    "tf32": ((128, 64), 32, 4),
    "tf32x3": ((128, 64), 32, 4),
    "ieee": ((64, 64), 16, 3),  # without tensor cores
}
# Of the estimate below. Triton adds barriers, and buffers where it converts layouts.
SHARED_RESERVE = 1.15


@dataclass(frozen=True)
class Limits:
    """Of a device: multiprocessors, and shared memory that a program may have."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Tile:
    """The blocks of a product that a program computes at once, and Triton's options.

    splits: programs that share the depth of a tile, where there are too few tiles for the device.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    @property
    def fields(self) -> tuple[int, ...]:
        """`Tile(*fields)` is the tile."""
        return astuple(self)

    def count(self, problem: ConvProblem) -> int:
        """The tiles of a problem, all splits included."""
        row_tiles, column_tiles = self.grid(problem)
        return problem.products * row_tiles * column_tiles * self.splits

    def grid(self, problem: ConvProblem) -> tuple[int, int]:
        """The tiles of a product: in rows, and in columns."""
        return -(-problem.rows // self.block_m), -(-problem.columns // self.block_n)

    def shared_bytes(self, problem: ConvProblem) -> int:
        """An estimate of the shared memory of a program: `num_stages` blocks of both factors."""
        per_stage = (self.block_m + self.block_n) * self.block_k * problem.dtype.itemsize
        return int(self.num_stages * per_stage * SHARED_RESERVE)


def default_tile(problem: ConvProblem, limits: Limits) -> Tile:
    """A tile by the shape of the problem: large where there are many rows, so that GPU memory is
    read least often; splits where tiles do not fill the device."""
    rows, block_n = problem.rows, max(16, _power_of_two(problem.columns))
    block_m = 128 if rows >= MANY_ROWS else 64 if rows > FEW_ROWS else max(16, _power_of_two(rows))
    return _fitted(block_m, block_n, problem, limits)


def candidate_tiles(problem: ConvProblem, limits: Limits) -> list[Tile]:
    """The default tile, which comes first, and its neighbors."""
    first = default_tile(problem, limits)
    halves = [(first.block_m // 2, first.block_n), (first.block_m, first.block_n // 2)]
    found = [first, *(_fitted(*half, problem, limits) for half in halves if min(half) >= 16)]
    if first.splits > 1:
        found.append(replace(first, splits=first.splits // 2))
    return list(dict.fromkeys(found))


def _fitted(block_m: int, block_n: int, problem: ConvProblem, limits: Limits) -> Tile:
    """A tile of about this size that the registers and the shared memory hold, with its splits."""
    largest, block_k, stages = LARGEST[_kind(problem)]
    block_m, block_n = min(block_m, largest[0]), min(block_n, largest[1])
    block_k = next(block for block in problem.blocks if block <= block_k)
    has_many_warps = block_m >= 128 or block_m * block_n >= largest[0] * largest[1]
    tile = Tile(block_m, block_n, block_k, 8 if has_many_warps else 4, stages)
    while tile.num_stages > 2 and tile.shared_bytes(problem) > limits.shared_bytes:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return replace(tile, splits=_splits(tile, problem, limits))


def _kind(problem: ConvProblem) -> str:
    """The number format of the products."""
    return "16 bits" if problem.dtype.itemsize < 4 else str(problem.precision)


def _splits(tile: Tile, problem: ConvProblem, limits: Limits) -> int:
    """As many splits as leave every multiprocessor a tile, a power of two."""
    splits, blocks = 1, sum(problem.depths) // tile.block_k
    while (
        2 * splits <= MAX_SPLITS
        and 2 * splits * tile.count(problem) <= limits.multiprocessors
        and blocks // (2 * splits) >= MIN_BLOCKS_PER_SPLIT
    ):
        splits *= 2
    return splits


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()
