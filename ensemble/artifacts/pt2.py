"""`.pt2`: a program of torch.export, which `torch.export.load` reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ensemble.machine import captured_warnings


def write(program: ExportedProgram, path: Path) -> None:
    """Write `program` to `path`. Tensors that share memory are written once."""
    # torch warns of channels-last tensors that they may not be complete; each is its own storage.
    with captured_warnings.capture("ignore"):
        torch.export.save(program, path)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The program at `path`, with torch alone, on the device that it was traced on."""
    with captured_warnings.capture("ignore"):
        call: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return call
