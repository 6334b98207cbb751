"""Run the kernels of N models as one table of steps, on all cores, with no Python in between."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from ensemble.compiler import kernels
from ensemble.compiler.codegen.simd import FLOAT_BYTES
from ensemble.compiler.planning import row_tiling
from ensemble.compiler.planning.operation import Kind, Operation
from ensemble.compiler.runtime import serial_copy
from ensemble.compiler.runtime.huge_pages import in_large_pages
from ensemble.compiler.runtime.reference import Reference
from ensemble.compiler.runtime.thread_team import run_together
from ensemble.machine.per_process import PerProcess

ALIGNMENT = 64  # bytes: a line of the cache


class Program(nn.Module):
    """Operations in order, for N models.

    A kernel that adds in another order than torch's, or multiplies what an output does not depend
    on by zero, overflows or makes NaN elsewhere; Winograd's and Strassen's round small numbers as
    coarsely as large ones beside them. So images of a result that hold a NaN or a magnitude from
    `simd.LARGE` on are computed again by torch (`Reference`). No step hides such a number: what
    could, as relu does, makes it NaN, and all steps propagate NaN.

    Args:
        operations: those that write a value come before those that read it.
        inputs: the values that a call brings, each `(N, B, C, H, W)` or `(B, C, H, W)` for all.
        outputs: the values that a call returns, each `(N, B, C, H, W)`.
        num_models: N.
        threads: cores to use; models are spread over them.
        dtype: of inputs and outputs; in between all is float32, as it is where torch computes.

    Raises:
        ValueError: an operation that its kernel cannot run; in a call, an input of another shape,
            dtype or device than the program was made for.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
        num_models: int,
        threads: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.operations, self._num_models, self._threads = operations, num_models, threads
        self._inputs, self._outputs, self._dtype = inputs, outputs, dtype
        for operation in operations:
            if not kernels.can_run(operation.kind, operation.geometry):
                raise ValueError(f"no kernel: {operation.kind.label} of {operation.geometry}")
        made = {operation.out: operation for operation in operations}
        self._made = [made[value] for value in outputs]
        self._in_shapes = _in_shapes(operations)
        self._places = {value: _places(operations, value) for value in (*inputs, *outputs)}
        inside = {*made} - {*inputs} - {*outputs}
        runs = row_tiling.runs_of(operations, inside)
        offsets, arena_bytes = _plan(operations, outputs, runs)
        kernels.load()
        self._steps = np.zeros(len(operations), kernels.STEP)
        for step, operation in zip(self._steps, operations, strict=True):
            _fill(step, operation, offsets)
            if operation.kind == Kind.MAX_POOL:
                step["option"] = operation.x in inputs
        self._by_strips, whole = row_tiling.steps_by_strips(operations, self._steps, runs)
        self._whole = np.array([*whole.items()], np.int64).reshape(-1, 2)
        scratch_bytes = max(kernels.scratch_bytes(step.kind, step.geometry) for step in operations)
        # Cleared, so that no call is the first to touch them.
        self._memory = [
            [_kept(size).zero_() for _ in range(threads)] for size in (arena_bytes, scratch_bytes)
        ]
        self._arenas, self._scratches = (
            np.array([memory.data_ptr() for memory in memories], np.int64)
            for memories in self._memory
        )
        self._lock = PerProcess(threading.Lock)
        self._reference = PerProcess(lambda: Reference(operations))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        steps = self._steps.copy()  # a call's own: nothing of it is left for the next one
        held: list[Tensor] = []
        for value, x in zip(self._inputs, inputs, strict=True):
            held += self._bind_input(steps, value, x)
        shapes = [(self._num_models, *step.geometry.out_shape) for step in self._made]
        results = [
            _new(prod(shape) * FLOAT_BYTES).view(torch.float32).view(shape) for shape in shapes
        ]
        for value, tensor in zip(self._outputs, results, strict=True):
            self._bind(steps, value, tensor, shared=False)
        self._run(steps, [*held, *results])
        self._make_exact(inputs, results)
        return [
            _as_torch_has_it(serial_copy.contiguous(result, self._dtype), step)
            for result, step in zip(results, self._made, strict=True)
        ]

    def _make_exact(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Compute images of results anew by torch, where a number is NaN or large."""
        found = [_marks(result, step) for result, step in zip(results, self._made, strict=True)]
        if not any(marks.any() for marks in found):
            return
        for model in np.logical_or.reduce([marks.any(1) for marks in found]).nonzero()[0]:
            given = {
                value: x if x.dim() == 4 else x[model]
                for value, x in zip(self._inputs, inputs, strict=True)
            }
            exact = self._reference()(model, given, self._outputs)
            for value, result, marks in zip(self._outputs, results, found, strict=True):
                images = exact[value].movedim(1, -1)
                for index in marks[model].nonzero()[0]:
                    result[model, index, ..., : images.shape[-1]] = images[index]

    def _bind_input(self, steps: np.ndarray, value: int, x: Tensor) -> list[Tensor]:
        """x in the orders in which its readers read it; to be kept while they run."""
        expected = self._in_shapes[value]
        fits = (x.shape[1:] if x.dim() == 5 and len(x) == self._num_models else x.shape) == expected
        if not fits or x.dtype != self._dtype or x.device.type != "cpu":
            raise ValueError(
                f"expected an input of shape {expected}, or {(self._num_models, *expected)}, in"
                f" {self._dtype} on the CPU, found {tuple(x.shape)} in {x.dtype} on {x.device}"
            )
        held: dict[int, Tensor] = {}  # by the channels in memory; 0: before height and width
        for index, operand in self._places[value]:
            channels = _channels_read(self.operations[index], operand)
            if channels not in held:
                held[channels] = _as_read(x, channels)
            _bind(steps[index], operand, held[channels], shared=x.dim() == 4)
        return list(held.values())

    def _bind(self, steps: np.ndarray, value: int, tensor: Tensor, *, shared: bool) -> None:
        for index, operand in self._places[value]:
            _bind(steps[index], operand, tensor, shared=shared)

    def _run(self, steps: np.ndarray, operands: list[Tensor]) -> None:
        """Take all models through the steps, whose operands live until the last thread has left."""
        by_strips = self._by_strips.copy()
        by_strips[self._whole[:, 0]] = steps[self._whole[:, 1]]
        state = kernels.new_state(self._threads, len(by_strips))

        def part(index: int) -> None:
            _ = operands
            kernels.run(
                steps,
                by_strips,
                self._arenas,
                self._scratches,
                state.ctypes.data,
                index,
                self._threads,
                self._num_models,
            )

        def stop() -> None:
            state[kernels.STOP] = 1

        with self._lock():  # the arenas are its own: one call at a time
            if self._threads == 1:
                part(0)
            else:
                run_together(part, self._threads, stop=stop)


def _places(operations: Sequence[Operation], value: int) -> list[tuple[int, str]]:
    """Where a value is an operand: of which step, and which."""
    return [
        (index, operand)
        for index, operation in enumerate(operations)
        for operand in ("x", "other", "out")
        if getattr(operation, operand) == value
    ]


def _bind(step: np.void, operand: str, tensor: Tensor, *, shared: bool) -> None:
    stride = 0 if shared else tensor.stride(0) * FLOAT_BYTES
    step[operand], step[f"{operand}_stride"] = tensor.data_ptr(), stride


def _channels_read(operation: Operation, operand: str) -> int:
    """How many channels an operand has in memory; 0 where they come before height and width."""
    if operand == "x":
        is_planar = kernels.is_planar(operation.geometry)
        return 0 if is_planar else operation.geometry.channels
    return operation.geometry.out_channels


def _as_read(x: Tensor, channels: int) -> Tensor:
    """x in float32 with so many channels, the last ones zeros, behind height and width; see
    `_channels_read`."""
    if not channels:
        return serial_copy.contiguous(x, torch.float32)
    return serial_copy.filled_up(x.movedim(-3, -1), channels, torch.float32)


def _marks(result: Tensor, step: Operation) -> np.ndarray:
    """`(N, B)`: does an image of a step's result hold a number that is NaN or large?"""
    marks = np.zeros(result.shape[:2], np.uint8)
    pixels, channels = prod(result.shape[2:4]), result.shape[-1]
    real = step.out_channels or channels
    kernels.mark_large(result.data_ptr(), marks.size, pixels, channels, real, marks.ravel())
    return marks


def _as_torch_has_it(result: Tensor, step: Operation) -> Tensor:
    """A step's result without the channels that fill it up, those before height and width."""
    return result.movedim(-1, -3)[..., : step.out_channels, :, :]


# Steps that read each number before they write it, and nothing else: over their input.
_IN_PLACE = (Kind.ACTIVATION, Kind.SUM, Kind.SCALE, Kind.AFFINE)


def _plan(
    operations: Sequence[Operation], outputs: Sequence[int], runs: Sequence[row_tiling.Run]
) -> tuple[dict[int, int], int]:
    """Where in a core's arena each value between two operations lies, and the arena's bytes.

    A value takes its step's own input, where nobody reads that afterwards and the step can work in
    place, or the first free slot that is large enough, once its last reader has run, with all of
    the run by strips that it is of.
    """
    within = {index: run for run in runs for index in range(run.first, run.end)}
    ends = [within[i].end - 1 if i in within else i for i in range(len(operations))]
    last_read = {value: ends[i] for i, step in enumerate(operations) for value in step.reads}
    offsets: dict[int, int] = {}
    slots: dict[int, tuple[int, int]] = {}  # offset -> (bytes, the step that last needs it)
    end = 0
    for index, operation in enumerate(operations):
        if operation.out in outputs or operation.out in offsets:  # of several copies the first
            continue
        until = max(last_read.get(operation.out, index), ends[index])
        x = operation.x
        in_place = operation.kind in _IN_PLACE and index not in within
        if in_place and x in offsets and last_read[x] == index:
            offset = offsets[x]
            room = slots[offset][0]
        else:
            size = _bytes(operation)
            free = [at for at, (room, until) in slots.items() if room >= size and until < index]
            offset = min(free, key=lambda at: slots[at][0], default=end)
            room = slots[offset][0] if free else size
            end = max(end, offset + room)
        slots[offset] = room, until
        offsets[operation.out] = offset
    return offsets, end


def _bytes(operation: Operation) -> int:
    """Of its result, in whole lines of the cache."""
    size = int(np.prod(operation.geometry.out_shape)) * FLOAT_BYTES
    return -(-size // ALIGNMENT) * ALIGNMENT


def _in_shapes(operations: Sequence[Operation]) -> dict[int, tuple[int, ...]]:
    """What each value that is read must be for one model: (B, C, H, W)."""
    shapes: dict[int, tuple[int, ...]] = {}
    for operation in operations:
        geometry = operation.geometry
        channels = operation.channels or geometry.channels
        shapes[operation.x] = geometry.images, channels, *geometry.size
        if operation.other is not None:
            channels = operation.out_channels or geometry.out_channels
            size = (1, 1) if operation.kind == Kind.SCALE else geometry.out_size
            shapes[operation.other] = geometry.images, channels, *size
    return shapes


def _fill(step: np.void, operation: Operation, offsets: dict[int, int]) -> None:
    step["kind"], step["variant"] = operation.kind, kernels.KERNELS[operation.kind].variant
    step["relu"], step["function"] = operation.relu, operation.function
    step["option"], step["number"] = operation.option, operation.number
    step["real"] = operation.channels or operation.geometry.channels
    kernels.fill_geometry(step, operation.geometry)
    for name in ("weight", "bias"):
        tensor = getattr(operation, name)
        if tensor is not None:
            stride = tensor.stride(0) * tensor.element_size()
            step[name], step[f"{name}_stride"] = tensor.data_ptr(), stride
    for name in ("x", "other", "out"):
        value = getattr(operation, name)
        if value in offsets:
            step[name], step[f"{name}_stride"] = offsets[value], kernels.LOCAL


def _new(size: int) -> Tensor:
    """So many bytes, which begin at a line of the cache."""
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def _kept(size: int) -> Tensor:
    """The same for as long as the program lives, in large pages."""
    memory = in_large_pages(size + ALIGNMENT)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]
