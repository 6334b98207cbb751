"""Steps by strips: where the values between them are larger than a cache, a few rows at a time.

A 1x1 convolution that makes six times the channels, the grouped one that reads them and the one
after it would each write or read megabytes. A run of such steps is taken through strips of rows
instead: what lies between the steps is then read while it is still in the core's cache. Each strip
of a step is a step of its own, of fewer rows: the kernels know nothing of it. Rows that the next
strip reads too are moved to where it begins (Alwani and others, Fused-Layer CNN Accelerators,
MICRO 2016, who call it reuse).
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
from ensemble.compiler.planning.operation import Geometry, Kind, Operation

# A value that is larger has left the cache (1 MB a core here) when the next step reads it.
LARGE_BYTES = 1024 * 1024
STRIP_BYTES = 384 * 1024  # of the values between the steps of a run, at a time
# Kernels that compute a row by itself, whose weights are soon read.
_BY_ROWS = (
    *(Kind.DIRECT, Kind.DIRECT_BF16, Kind.GROUPED, Kind.STRASSEN),
    *(Kind.ACTIVATION, Kind.AFFINE, Kind.SUM, Kind.SCALE),
)


@dataclass(frozen=True)
class Run:
    """Operations from `first` to before `end`, by strips of so many rows of the last one's."""

    first: int
    end: int
    rows: int


def runs_of(operations: Sequence[Operation], inside: Collection[int]) -> list[Run]:
    """The runs that are worth it.

    Args:
        operations: in order.
        inside: values that no call brings or returns.
    """
    readers = Counter(value for operation in operations for value in operation.reads)

    def follows(before: Operation, after: Operation) -> bool:
        large = prod(before.geometry.out_shape[1:]) * FLOAT_BYTES > LARGE_BYTES
        handed_on = after.x == before.out and readers[before.out] == 1
        return large and handed_on and before.out in inside

    able = [_is_by_rows(operation, inside) for operation in operations]
    ends = [
        index + 1
        for index, (before, after) in enumerate(pairwise(operations))
        if not (able[index] and able[index + 1] and follows(before, after))
    ]
    bounds = pairwise([0, *ends, len(operations)])
    long = ((first, end) for first, end in bounds if end - first > 1)
    runs = (Run(first, end, _rows(operations[first:end])) for first, end in long)
    return [run for run in runs if run.rows]


def steps_by_strips(
    operations: Sequence[Operation], steps: np.ndarray, runs: Sequence[Run]
) -> tuple[np.ndarray, dict[int, int]]:
    """The steps with those of each run by strips, and where those that are whole stand: in the
    result, and in `steps`."""
    made: list[np.void] = []
    whole: dict[int, int] = {}
    begin = 0
    for run in runs:
        for index in range(begin, run.first):
            whole[len(made)] = index
            made.append(steps[index])
        chain = operations[run.first : run.end]
        for image in range(chain[0].geometry.images):
            for part in _parts(chain, run.rows):
                made += _steps_of(steps[run.first + part.index], chain, part, image)
        begin = run.end
    for index in range(begin, len(steps)):
        whole[len(made)] = index
        made.append(steps[index])
    return np.array(made, steps.dtype), whole


@dataclass(frozen=True)
class Part:
    """A step of a run in one strip: which one, and of fewer rows; of none where all are there.

    `top`: the first row that it reads. `begin`: the first that it writes. `moved`: so many rows,
    from that one of the strip before on, that are moved first, to where this strip begins.
    """

    index: int
    geometry: Geometry | None
    top: int
    begin: int
    moved: tuple[int, int]


def _parts(chain: Sequence[Operation], rows: int) -> Iterator[Part]:
    """The steps of a run by strips of so many rows of the last step's output."""
    height = chain[-1].geometry.out_size[0]
    held = [(0, 0)] * len(chain)  # the rows of each step's result that are there
    for first in range(0, height, rows):
        parts, need = list[Part](), (first, min(first + rows, height))
        for index in reversed(range(len(chain))):
            (low, high), (start, end) = need, held[index]
            begin = min(max(low, end), high)
            held[index], moved = need, (begin - low, low - start)
            if begin == high:
                parts.append(Part(index, None, 0, begin, moved))
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
            parts.append(Part(index, geometry, need[0], begin, moved))
        yield from reversed(parts)


def _rows_read(geometry: Geometry, begin: int, end: int) -> tuple[int, int]:
    """The rows of the input, from one that may lie above the image, for these of the output."""
    top = begin * geometry.stride[0] - geometry.padding[0]
    reach = (end - begin - 1) * geometry.stride[0] + (geometry.kernel[0] - 1) * geometry.dilation[0]
    return top, min(top + reach + 1, geometry.size[0])


def _steps_of(
    step: np.void, chain: Sequence[Operation], part: Part, image: int
) -> Iterator[np.void]:
    """The rows that are moved, where there are any, and the part itself.

    A run's input and output are whole; between its steps a strip lies where the whole value would
    begin.
    """
    operation, made = chain[part.index], step.copy()
    whole, (count, distance) = operation.geometry, part.moved
    line = whole.size[1] * whole.channels * FLOAT_BYTES
    out_line = whole.out_size[1] * whole.out_channels * FLOAT_BYTES
    at = (image * whole.out_size[0] + part.begin) * out_line
    if count and distance and part.index < len(chain) - 1:
        yield _move(step, whole, count, distance * out_line)
    if part.geometry is None:
        return
    kernels.fill_geometry(made, part.geometry)
    if part.index == 0:
        made["x"] += (image * whole.size[0] + part.top) * line
    if operation.kind == Kind.SCALE:  # by one pixel of each image
        made["other"] += image * whole.channels * FLOAT_BYTES
    elif operation.other is not None:
        made["other"] += at
    if part.index == len(chain) - 1:
        made["out"] += at
    else:
        made["out"] += count * out_line
    yield made


def _move(step: np.void, geometry: Geometry, rows: int, distance: int) -> np.void:
    """So many rows of a step's output, to where it begins."""
    move: np.void = np.zeros(1, step.dtype)[0]
    size, channels = (rows, geometry.out_size[1]), geometry.out_channels
    one, none = (1, 1), (0, 0)
    kernels.fill_geometry(move, Geometry(1, channels, size, channels, size, one, one, none, one))
    move["kind"], move["real"] = Kind.COPY, channels
    move["x"], move["x_stride"] = step["out"] + distance, step["out_stride"]
    move["out"], move["out_stride"] = step["out"], step["out_stride"]
    return move


def _is_by_rows(operation: Operation, inside: Collection[int]) -> bool:
    """Can a step be taken by rows, and do all its values lie in the core's own memory?"""
    values = *operation.reads, operation.out
    by_rows = operation.kind in _BY_ROWS and not kernels.is_planar(operation.geometry)
    return by_rows and all(value in inside for value in values)


def _rows(chain: Sequence[Operation]) -> int:
    """Rows of a strip, as many as the cache holds; 0 where the weights would be read too often."""
    height = chain[-1].geometry.out_size[0]
    between = sum(prod(operation.geometry.out_shape[1:]) for operation in chain[:-1]) * FLOAT_BYTES
    weights = sum(_weight_bytes(operation) for operation in chain)
    rows = max(1, height * STRIP_BYTES // between)
    strips = -(-height // rows)
    rows = -(-height // strips)
    fits = all(not part.geometry or part.geometry.size[0] > 0 for part in _parts(chain, rows))
    return rows if fits and (strips - 1) * weights <= between else 0


def _weight_bytes(operation: Operation) -> int:
    """Of one model."""
    weight = operation.weight
    return 0 if weight is None else weight[0].numel() * weight.element_size()
