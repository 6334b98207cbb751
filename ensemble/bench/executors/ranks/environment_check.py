"""Are all ranks alike? Others than rank 0 are refused by name, before anything is timed."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ensemble.bench import environment
from ensemble.bench.config import Config
from ensemble.errors import InputError
from ensemble.machine import devices, launch
from ensemble.models import stacking

# What rank 0 alone reads or writes; and what depends on the host's folders, not on the run.
OF_RANK_0 = {"image_path", "resume", "max_minutes"}


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself when it joins. `error` is why it cannot work, None if it can."""

    host: str
    pid: int
    place: str = ""
    device_name: str | None = None
    error: str | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)  # see `shared`


def shared(config: Config, device: torch.device, weights: str, model: nn.Module) -> dict[str, Any]:
    """What must be the same on all ranks: versions, device, settings, and a file that all read."""
    parts = (config.models, config.run, config.measure)
    settings = {
        option.name: getattr(part, option.name)
        for part in parts
        for option in fields(part)
        if option.name not in OF_RANK_0
    }
    own_files = len(config.models.model_path or ()) > 1 or weights.startswith("random")
    return {
        "program": environment.git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": device.type,
        "device_name": devices.device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{f"--{name}": value for name, value in settings.items()},
        "weights": weights,
        "checksum of the weights": None if own_files else _checksum(model),
        "classes": [*model.parameters()][-1].shape[0],
    }


def check(ranks: Sequence[Facts]) -> None:
    """Raise InputError, which names a rank, unless all can work and are alike."""
    for rank, facts in enumerate(ranks):
        if facts.error is not None:
            same = len({other.error for other in ranks}) == 1
            raise InputError(facts.error if same else f"{name(rank, facts)}: {facts.error}")
    expected = ranks[0].shared
    for rank, facts in enumerate(ranks):
        for what, found in facts.shared.items():
            if found != expected[what]:
                wanted = f"expected {what} {_words(expected[what])} like rank 0"
                raise InputError(f"{name(rank, facts)}: {wanted}, found {_words(found)}")


def name(rank: int, facts: Facts) -> str:
    """`rank 1 on host-b`."""
    return launch.rank_name(rank, facts.host)


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _checksum(model: nn.Module) -> int:
    """Of the names and bytes of all tensors."""
    total = 0
    for tensor_name, tensor in stacking.named_tensors(model).items():
        plain = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        total = zlib.crc32(plain, zlib.crc32(tensor_name.encode(), total))
    return total
