"""Memory planning: where in a core's arena each intermediate value of a program lies.

Greedy best fit over liveness intervals; elementwise steps work in place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

from ensemble.compiler.codegen.simd import FLOAT_BYTES
from ensemble.compiler.kernels import KERNELS
from ensemble.compiler.planning.row_tiling import Tiling
from ensemble.compiler.planning.step import Step

ALIGNMENT = 64  # bytes: a cache line


def plan_memory(
    steps: Sequence[Step], outputs: Collection[int], tilings: Sequence[Tiling]
) -> tuple[dict[int, int], int]:
    """The offset of each intermediate value in an arena, and the arena's bytes.

    A value reuses its step's own input if that dies there and the step works in place, else the
    smallest free slot that fits. Slots are free after the last reader, and with row tiling after
    the last step of the reader's tiling.
    """
    tiling_of = {index: tiling for tiling in tilings for index in range(tiling.first, tiling.end)}
    ends = [tiling_of[i].end - 1 if i in tiling_of else i for i in range(len(steps))]
    last_read = {value: ends[i] for i, step in enumerate(steps) for value in step.reads}
    offsets: dict[int, int] = {}
    slots: dict[int, tuple[int, int]] = {}  # offset -> (bytes, last step that needs it)
    end = 0
    for index, step in enumerate(steps):
        if step.out in outputs or step.out in offsets:  # copies write one output: the first counts
            continue
        until = max(last_read.get(step.out, index), ends[index])
        x = step.x
        in_place = KERNELS[step.kind].is_in_place and index not in tiling_of
        if in_place and x in offsets and last_read[x] == index:
            offset = offsets[x]
            room = slots[offset][0]
        else:
            size = _bytes(step)
            free = [at for at, (room, until) in slots.items() if room >= size and until < index]
            offset = min(free, key=lambda at: slots[at][0], default=end)
            room = slots[offset][0] if free else size
            end = max(end, offset + room)
        slots[offset] = room, until
        offsets[step.out] = offset
    return offsets, end


def _bytes(step: Step) -> int:
    """The size of its output, in whole cache lines."""
    size = prod(step.geometry.out_shape) * FLOAT_BYTES
    return -(-size // ALIGNMENT) * ALIGNMENT
