"""A program: the steps of N models as one table, run on all cores with no Python in between."""

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
from ensemble.compiler.planning.memory_planning import ALIGNMENT, plan_memory
from ensemble.compiler.planning.row_tiling import CacheSizes
from ensemble.compiler.planning.step import Kind, Step
from ensemble.compiler.runtime import entry_points, serial_copy, work_stealing
from ensemble.compiler.runtime.huge_pages import allocate_huge
from ensemble.compiler.runtime.reference import Reference
from ensemble.compiler.runtime.thread_team import run_together
from ensemble.machine.per_process import PerProcess


class Program(nn.Module):
    """Steps in order, for N models.

    A kernel that sums in another order than torch, or multiplies padding by zero, overflows or
    gives NaN at other places; the rounding errors of Winograd and Strassen scale with the largest
    numbers nearby. So output images that hold a NaN or a magnitude from `simd.LARGE` on are
    recomputed by torch (`Reference`). No step hides such a number: relu and others that could turn
    it into NaN, and all steps propagate NaN.

    Args:
        steps: topologically ordered.
        inputs: value ids of the arguments of a call, each `(N, B, C, H, W)`, or `(B, C, H, W)`
            shared by all models.
        outputs: value ids of the results of a call, each `(N, B, C, H, W)`.
        num_models: N.
        threads: cores to use; models are distributed over them.
        dtype: of inputs and outputs. Intermediate values are float32, as is the fallback.
        cache: of a core, for row tiling. Default: `row_tiling.CACHE`.

    Raises:
        ValueError: a step that its kernel cannot run; in a call, an input of another shape, dtype
            or device than the program was built for.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
        num_models: int,
        threads: int,
        dtype: torch.dtype,
        cache: CacheSizes | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.num_models, self._threads = steps, num_models, threads
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype
        self._cache = cache
        for step in steps:
            if not kernels.can_run(step.kind, step.geometry):
                raise ValueError(f"no kernel: {step.kind.label} of {step.geometry}")
        producers = {step.out: step for step in steps}
        self._output_steps = [producers[value] for value in outputs]
        self._in_shapes = _in_shapes(steps)
        self._uses = {value: _uses(steps, value) for value in (*inputs, *outputs)}
        internal = {*producers} - {*inputs} - {*outputs}
        tilings = row_tiling.select_tilings(steps, internal, cache=cache)
        offsets, arena_bytes = plan_memory(steps, outputs, tilings)
        entry_points.load()
        self._table = np.zeros(len(steps), kernels.STEP_DTYPE)
        for row, step in zip(self._table, steps, strict=True):
            _fill_row(row, step, offsets)
            if step.kind == Kind.MAX_POOL:
                row["option"] = step.x in inputs
        self._tiled_table, untiled = row_tiling.tile_steps(steps, self._table, tilings)
        self._untiled = np.array([*untiled.items()], np.int64).reshape(-1, 2)
        scratch_bytes = max(kernels.scratch_bytes(step.kind, step.geometry) for step in steps)
        # Zeroed, so that no call takes the page faults of the first touch.
        self._memory = [
            [_allocate_aligned_huge(size).zero_() for _ in range(threads)]
            for size in (arena_bytes, scratch_bytes)
        ]
        self._arenas, self._scratches = (
            np.array([memory.data_ptr() for memory in memories], np.int64)
            for memories in self._memory
        )
        self._lock = PerProcess(threading.Lock)
        self._reference = PerProcess(lambda: Reference(steps))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        table = self._table.copy()  # private to this call
        held: list[Tensor] = []
        for value, x in zip(self.inputs, inputs, strict=True):
            held += self._bind_input(table, value, x)
        shapes = [(self.num_models, *step.geometry.out_shape) for step in self._output_steps]
        results = [
            _allocate_aligned(prod(shape) * FLOAT_BYTES).view(torch.float32).view(shape)
            for shape in shapes
        ]
        for value, tensor in zip(self.outputs, results, strict=True):
            self._bind(table, value, tensor, shared=False)
        self._run(table, [*held, *results])
        self._recompute_overflows(inputs, results)
        return [
            _in_nchw(serial_copy.contiguous(result, self.dtype), step)
            for result, step in zip(results, self._output_steps, strict=True)
        ]

    def with_steps(self, steps: Sequence[Step]) -> Program:
        """A program of other steps with the same values, on memory of its own."""
        return Program(
            steps,
            inputs=self.inputs,
            outputs=self.outputs,
            num_models=self.num_models,
            threads=self._threads,
            dtype=self.dtype,
            cache=self._cache,
        )

    def workspace(self) -> list[Tensor]:
        """The memory of intermediate values, and scratch memory."""
        return [memory for memories in self._memory for memory in memories]

    def weights_changed(self) -> None:
        """Forget copies of the weights, which were written to."""
        steps = self.steps
        self._reference = PerProcess(lambda: Reference(steps))

    def _recompute_overflows(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Recompute, by torch, images of results that hold a NaN or a large number."""
        found = [
            _overflows(result, step)
            for result, step in zip(results, self._output_steps, strict=True)
        ]
        if not any(marks.any() for marks in found):
            return
        for model in np.logical_or.reduce([marks.any(1) for marks in found]).nonzero()[0]:
            given = {
                value: x if x.dim() == 4 else x[model]
                for value, x in zip(self.inputs, inputs, strict=True)
            }
            exact = self._reference()(model, given, self.outputs)
            for value, result, marks in zip(self.outputs, results, found, strict=True):
                images = exact[value].movedim(1, -1)
                for index in marks[model].nonzero()[0]:
                    result[model, index, ..., : images.shape[-1]] = images[index]

    def _bind_input(self, table: np.ndarray, value: int, x: Tensor) -> list[Tensor]:
        """Bind x to its readers, in the layouts that they read; keep the result while they run."""
        expected = self._in_shapes[value]
        fits = (x.shape[1:] if x.dim() == 5 and len(x) == self.num_models else x.shape) == expected
        if not fits or x.dtype != self.dtype or x.device.type != "cpu":
            raise ValueError(
                f"expected an input of shape {expected}, or {(self.num_models, *expected)}, in"
                f" {self.dtype} on the CPU, got {tuple(x.shape)} in {x.dtype} on {x.device}"
            )
        held: dict[int, Tensor] = {}  # by padded channels in NHWC; 0: NCHW
        for index, operand in self._uses[value]:
            channels = _channels_read(self.steps[index], operand)
            if channels not in held:
                held[channels] = _in_layout(x, channels)
            _bind(table[index], operand, held[channels], shared=x.dim() == 4)
        return list(held.values())

    def _bind(self, table: np.ndarray, value: int, tensor: Tensor, *, shared: bool) -> None:
        for index, operand in self._uses[value]:
            _bind(table[index], operand, tensor, shared=shared)

    def _run(self, table: np.ndarray, operands: list[Tensor]) -> None:
        """Run all steps of all models; `operands` live until the last thread has left."""
        tiled_table = self._tiled_table.copy()
        tiled_table[self._untiled[:, 0]] = table[self._untiled[:, 1]]
        state = work_stealing.new_state(self._threads, len(tiled_table))

        def work(worker: int) -> None:
            _ = operands
            entry_points.run(
                table,
                tiled_table,
                self._arenas,
                self._scratches,
                state.ctypes.data,
                worker,
                self._threads,
                self.num_models,
            )

        def stop() -> None:
            state[work_stealing.STOP] = 1

        with self._lock():  # the arenas belong to the program: one call at a time
            if self._threads == 1:
                work(0)
            else:
                run_together(work, self._threads, stop=stop)


def _uses(steps: Sequence[Step], value: int) -> list[tuple[int, str]]:
    """The uses of a value: index of the step, and which operand."""
    return [
        (index, operand)
        for index, step in enumerate(steps)
        for operand in ("x", "other", "out")
        if getattr(step, operand) == value
    ]


def _bind(row: np.void, operand: str, tensor: Tensor, *, shared: bool) -> None:
    stride = 0 if shared else tensor.stride(0) * FLOAT_BYTES
    row[operand], row[f"{operand}_stride"] = tensor.data_ptr(), stride


def _channels_read(step: Step, operand: str) -> int:
    """The channels of an operand in memory, with padding; 0 for NCHW."""
    if operand == "x":
        return 0 if kernels.is_nchw(step.geometry) else step.geometry.channels
    return step.geometry.out_channels


def _in_layout(x: Tensor, channels: int) -> Tensor:
    """x in float32, in NHWC with channels zero-padded to so many; 0: in NCHW."""
    if not channels:
        return serial_copy.contiguous(x, torch.float32)
    return serial_copy.zero_padded(x.movedim(-3, -1), channels, torch.float32)


def _overflows(result: Tensor, step: Step) -> np.ndarray:
    """`(N, B)`: which images of a step's result hold a NaN or a large number."""
    marks = np.zeros(result.shape[:2], np.uint8)
    pixels, channels = prod(result.shape[2:4]), result.shape[-1]
    unpadded = step.out_channels or channels
    entry_points.mark_overflows(
        result.data_ptr(), marks.size, pixels, channels, unpadded, marks.ravel()
    )
    return marks


def _in_nchw(result: Tensor, step: Step) -> Tensor:
    """A step's result without padding channels: a view `(N, B, C, H, W)`."""
    return result.movedim(-1, -3)[..., : step.out_channels, :, :]


def _in_shapes(steps: Sequence[Step]) -> dict[int, tuple[int, ...]]:
    """The shape of each value that is read, of one model: (B, C, H, W)."""
    shapes: dict[int, tuple[int, ...]] = {}
    for step in steps:
        geometry = step.geometry
        shapes[step.x] = geometry.images, step.unpadded_channels, *geometry.size
        if step.other is not None:
            size = (1, 1) if step.kind == Kind.SCALE else geometry.out_size
            shapes[step.other] = geometry.images, step.unpadded_out_channels, *size
    return shapes


def _fill_row(row: np.void, step: Step, offsets: dict[int, int]) -> None:
    row["kind"], row["variant"] = step.kind, kernels.KERNELS[step.kind].variant
    row["relu"], row["activation"] = step.relu, step.activation
    row["option"], row["scalar"] = step.option, step.scalar
    row["unpadded_channels"] = step.unpadded_channels
    kernels.fill_geometry(row, step.geometry)
    for name in ("weight", "bias"):
        tensor = getattr(step, name)
        if tensor is not None:
            stride = tensor.stride(0) * tensor.element_size()
            row[name], row[f"{name}_stride"] = tensor.data_ptr(), stride
    for name in ("x", "other", "out"):
        value = getattr(step, name)
        if value in offsets:
            row[name], row[f"{name}_stride"] = offsets[value], kernels.IN_ARENA


def _allocate_aligned(size: int) -> Tensor:
    """So many bytes, aligned to a cache line."""
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def _allocate_aligned_huge(size: int) -> Tensor:
    """The same in huge pages, for memory that lives as long as the program."""
    memory = allocate_huge(size + ALIGNMENT)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]
