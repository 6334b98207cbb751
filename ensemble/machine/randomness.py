"""Whether random numbers are drawn, by the states of the generators: nobody's is set."""

from __future__ import annotations

import random

import numpy as np
import torch


def states(device: torch.device) -> tuple[object, ...]:
    """Of the generators that a model's code draws from: equal as long as nothing is drawn.

    Other threads draw from the same ones.
    """
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"], *of_torch(device)


def of_torch(device: torch.device) -> tuple[object, ...]:
    """`states` of torch's own, from which vmap draws for each model anew."""
    own = [torch.random.get_rng_state()]
    if device.type != "cpu" and torch.accelerator.is_available():
        own.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in own)
