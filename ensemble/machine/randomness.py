"""Detect random draws by comparing generator states. No generator is seeded."""

from __future__ import annotations

import random

import numpy as np
import torch


def states(device: torch.device) -> tuple[object, ...]:
    """The states of Python's, NumPy's and torch's global generators: equal if nothing was drawn.

    The generators are shared by all threads of the process.
    """
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"], *torch_states(device)


def torch_states(device: torch.device) -> tuple[object, ...]:
    """The states of torch's generators only: vmap draws from them once per model."""
    states = [torch.random.get_rng_state()]
    if device.type != "cpu" and torch.accelerator.is_available():
        states.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)
