"""`.aoti.pt2`: code that AOTInductor compiled ahead of time, with the weights.

It runs on the kind of device, and on a CPU with the vector instructions, that it was compiled on,
with the same version of torch. `torch._inductor.aoti_load_package` reads it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ensemble.machine import captured_warnings


def write(program: ExportedProgram, path: Path) -> None:
    """Compile `program` and package it at `path`, which ends in `.pt2`.

    Inductor's cache would keep a library with all weights for each program: it is deleted.
    """
    import torch._inductor
    from torch._inductor.utils import fresh_cache

    with (
        captured_warnings.capture("ignore"),
        tempfile.TemporaryDirectory(prefix="resnet_vmap_", ignore_cleanup_errors=True) as folder,
        fresh_cache(dir=folder),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The compiled program at `path`, with torch alone."""
    import torch._inductor

    call: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(path))
    return call
