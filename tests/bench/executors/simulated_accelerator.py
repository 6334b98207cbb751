"""A simulated CUDA device: workers select it and compute on the CPU. See `install`."""

from __future__ import annotations

from typing import NoReturn

import torch

from ensemble.machine import devices


def install(error: str = "") -> None:
    """In a worker: its device is the CPU in place of a CUDA device, or refuses it with an error."""

    def select(name: str) -> torch.device:
        assert name.partition(":")[0] == "cuda"
        return refuse(error) if error else torch.device("cpu")

    devices.select_device = select


def refuse(error: str) -> NoReturn:
    raise torch.OutOfMemoryError(error)
