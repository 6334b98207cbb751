"""Contexts that models are built and called in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ensemble.machine.precision import Float32Precision, float32_precision


@contextlib.contextmanager
def execution_context(device: torch.device) -> Iterator[None]:
    """The context that models are built and called in: inference mode, no autocast, and `device`
    is the current one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.type != "cpu":
            stack.enter_context(current_device(device))
        for kind in dict.fromkeys((device.type, "cpu")):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which streams, events and graphs are by default made on `device`.

    Tensors of a device that is not there are fake.
    """
    if device.index is None or not torch.accelerator.is_available():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def ieee_products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which results are computed that others are compared with: CUDA multiplies in
    IEEE float32, whatever the caller has set."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return float32_precision(Float32Precision.IEEE)


def default_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which tensors are made on `device` by default.

    No context unless the caller has set another default: each is a function mode, under which torch
    takes other paths, such as plain instead of fused attention.
    """
    try:
        is_default = torch.get_default_device().type == device.type
    except RuntimeError:  # it makes a tensor there, which fails for a device without a driver
        is_default = False
    return contextlib.nullcontext() if is_default else device
