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

from ensemble.compiler.cuda.tiles import Limits
from tests.compiler.cuda.layers import Layer

# By compute capability: an A100 and an H100. CUDA C++ programming guide, technical specifications.
LIMITS = {80: Limits(108, 163 * 2**10), 90: Limits(132, 227 * 2**10)}


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


def compiled(launches: Sequence[Layer], capability: int) -> list[list[Usage]]:
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
        Layer(**json.loads(line)).launch()
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
