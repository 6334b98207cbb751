"""JAX on the CPU or on CUDA: the faster of a loop over the models and vmap, see `jax_resnet`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import folded
from ensemble.errors import UnavailableError
from ensemble.strategies import peer_autotune, peer_conversion, peer_streams
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.peer_autotune import RunModels


def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """A forward on the device of `example`: inputs, weights and outputs stay there.

    Raises:
        UnavailableError: JAX is not installed, does not have the device, or the models are not
            torchvision ResNets.
    """
    set_environment(example.device)
    package = peer_conversion.require("jax", example.device)
    device = jax_device(package, example.device)
    from ensemble.strategies import jax_resnet  # imports jax

    settings = jax_resnet.settings(folded(models, example), example, device)
    if example.device.type == "cuda":
        settings = {name: _ordered(make, example.device) for name, make in settings.items()}
    return peer_autotune.select_fastest(settings, example, len(models), tuning_models=len(models))


def set_environment(device: torch.device) -> None:
    """Restrict JAX to this kind of device before its first import.

    With its CUDA plugin installed JAX computes on the GPU by default, and reserves three quarters
    of its memory, also for arrays on the CPU.
    """
    if "jax" in sys.modules:
        return
    os.environ["JAX_PLATFORMS"] = "cpu" if device.type == "cpu" else "cuda,cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def jax_device(package: Any, device: torch.device) -> Any:
    """The `jax.Device` of a device of torch.

    Raises:
        UnavailableError: JAX does not have it: no plugin, or imported earlier for the CPU alone.
    """
    if device.type == "cpu":
        return package.devices("cpu")[0]
    try:
        found = package.devices("cuda")
    except RuntimeError as error:
        advice = peer_conversion.install_advice(device)
        raise UnavailableError(f"jax has no CUDA device in this process: {advice}") from error
    return next(one for one in found if one.local_hardware_id == (device.index or 0))


def _ordered(make: Callable[[int], RunModels], device: torch.device) -> Callable[[int], RunModels]:
    return lambda count: peer_streams.ordered(make(count), device)
