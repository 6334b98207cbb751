"""Check that all ranks have one environment; a rank that differs from rank 0 is named."""

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
from ensemble.models import outputs, sources, stacking

# Options that only rank 0 uses, or that depend on the folders of a host.
RANK_0_OPTIONS = {"image_path", "resume", "max_minutes"}


@dataclass(frozen=True)
class RankInfo:
    """What a rank reports when it joins. `error` is why it cannot work, None if it can."""

    host: str
    pid: int
    placement: str = ""
    device_name: str | None = None
    device_id: str | None = None  # the UUID of a GPU; None where a device has none
    error: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # see `shared_settings`


def shared_settings(
    config: Config, device: torch.device, weights: str, model: nn.Module
) -> dict[str, Any]:
    """What must be equal on all ranks: versions, device, options, and a shared checkpoint."""
    parts = (config.models, config.run, config.measure)
    options = {
        option.name: getattr(part, option.name)
        for part in parts
        for option in fields(part)
        if option.name not in RANK_0_OPTIONS
    }
    own_files = len(config.models.model_path or ()) > 1 or sources.is_of_each_rank(weights)
    return {
        "program": environment.git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": device.type,
        "device_name": devices.device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{f"--{name}": value for name, value in options.items()},
        "weights": weights,
        "checksum of the weights": None if own_files else _checksum(model),
        "classes": outputs.class_count(model),
    }


def check(ranks: Sequence[RankInfo]) -> None:
    """Raise InputError, which names a rank, unless all can work, have the settings of rank 0, and a
    GPU each."""
    for rank, info in enumerate(ranks):
        if info.error is not None:
            same = len({other.error for other in ranks}) == 1
            raise InputError(info.error if same else f"{rank_name(rank, info)}: {info.error}")
    expected = ranks[0].settings
    for rank, info in enumerate(ranks):
        for name, found in info.settings.items():
            if found != expected[name]:
                wanted = f"expected {name} {_text(expected[name])} like rank 0"
                raise InputError(f"{rank_name(rank, info)}: {wanted}, got {_text(found)}")
    _check_own_devices(ranks)


def _check_own_devices(ranks: Sequence[RankInfo]) -> None:
    """Raise InputError for a rank with the GPU of another: NCCL accepts one rank per GPU, and would
    fail in the first collective."""
    holders = dict[str, int]()
    for rank, info in enumerate(ranks):
        if info.device_id is None:
            continue
        if (other := holders.setdefault(info.device_id, rank)) != rank:
            raise InputError(
                f"{rank_name(rank, info)}: expected a GPU for each rank, got that of rank {other}"
                f" ({info.device_name}); start fewer ranks, or show each its own"
            )


def rank_name(rank: int, info: RankInfo) -> str:
    """`rank 1 on host-b`."""
    return launch.rank_name(rank, info.host)


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _checksum(model: nn.Module) -> int:
    """A checksum of the names and bytes of all tensors."""
    total = 0
    for tensor_name, tensor in stacking.named_tensors(model).items():
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        total = zlib.crc32(data, zlib.crc32(tensor_name.encode(), total))
    return total
