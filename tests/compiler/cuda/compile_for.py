"""Compile launches for a GPU that is not there, and report what the machine code uses.

    python -m tests.compiler.cuda.compile_for 90

reads launches from standard input, and writes what their kernels use, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ensemble.compiler.cuda.problem import ConvProblem, DotPrecision, Shortcut, packed_shape
from ensemble.compiler.cuda.tiles import Limits, Tile
from ensemble.compiler.planning.shape_inference import conv_geometry
from ensemble.compiler.planning.step import Activation

# By compute capability: an A100 and an H100. CUDA C++ programming guide, technical specifications.
LIMITS = {80: Limits(108, 163 * 2**10), 90: Limits(132, 227 * 2**10)}


@dataclass(frozen=True)
class Launch:
    """A convolution of N models, and how it is divided."""

    channels: int
    size: int
    filters: int
    kernel: int
    stride: int
    dtype: str
    precision: str
    tile: tuple[int, ...]
    other: bool = False
    shortcut: int = 0  # its channels
    groups: int = 1
    num_models: int = 4

    def problem(self) -> ConvProblem:
        """All sizes; the images are padded so that stride 1 keeps their size."""
        x = torch.empty(1, self.channels, self.size, self.size, device="meta")
        pair = (self.kernel // 2,) * 2
        geometry = conv_geometry(
            *(x, self.filters, (self.kernel,) * 2, (self.stride,) * 2, pair, (1, 1), self.groups)
        )
        return ConvProblem(
            self.num_models,
            geometry,
            getattr(torch, self.dtype),
            DotPrecision(self.precision),
            Activation.RELU,
            self.other,
            Shortcut(self.shortcut, (2, 2)) if self.shortcut else None,
        )

    def __call__(self) -> None:
        """Launch it on uninitialized tensors."""
        from ensemble.compiler.cuda import launch

        problem = self.problem()
        geometry, dtype = problem.geometry, problem.dtype
        images = self.num_models, 1
        weight = torch.empty(
            packed_shape(
                (self.num_models, self.filters, self.channels // self.groups, *geometry.kernel),
                self.groups,
                self.shortcut,
            ),
            dtype=dtype,
        )
        result = torch.empty(*images, self.filters, *geometry.out_size, dtype=dtype)
        twice = [2 * length for length in geometry.out_size]
        launch.conv2d(
            problem,
            Tile(*self.tile),
            torch.empty(*images, self.channels, *geometry.size, dtype=dtype),
            weight,
            torch.empty(self.num_models, self.filters),
            result if self.other else None,
            torch.empty(*images, self.shortcut, *twice, dtype=dtype) if self.shortcut else None,
        )


@dataclass(frozen=True)
class Usage:
    """What the machine code of a kernel uses."""

    kernel: str
    shared_bytes: int
    stack_bytes: int  # spilled registers
    registers: int
    wgmma: bool  # warpgroup matrix products (compute capability 9.0)
    mma: bool  # tensor cores of earlier ones
    tma: bool  # cp.async.bulk.tensor


def compiled(launches: Sequence[Launch], capability: int) -> list[list[Usage]]:
    """The kernels that each launch compiles, by a subprocess without Triton's interpreter."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-m", __name__, str(capability)],
        input="".join(json.dumps(asdict(one)) + "\n" for one in launches),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert not answer.returncode, answer.stderr
    lines = map(json.loads, answer.stdout.splitlines())
    return [[Usage(**usage) for usage in line] for line in lines]


def main() -> None:
    """Compile what standard input lists."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    capability = int(sys.argv[1])
    kernels: list[Any] = []

    class Driver:
        """The part of a driver that compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    for line in sys.stdin:
        kernels.clear()
        Launch(**json.loads(line))()
        print(json.dumps([asdict(usage(kernel)) for kernel in kernels]), flush=True)


def usage(kernel: Any) -> Usage:
    """What the machine code of a compiled kernel uses, by cuobjdump."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
    ptx = kernel.asm["ptx"]
    return Usage(
        kernel.metadata.name,
        kernel.metadata.shared,
        found["STACK"] + found["LOCAL"],
        found["REG"],
        "wgmma.mma_async" in ptx,
        "mma.sync" in ptx,
        "cp.async.bulk.tensor" in ptx,
    )


if __name__ == "__main__":
    main()
