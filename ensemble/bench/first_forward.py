"""The first forward of a process, timed, and what the models see in the plain image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensemble.bench.config import ModelOptions
from ensemble.errors import InputError, first_line
from ensemble.formatting import count
from ensemble.machine.devices import synchronize
from ensemble.machine.memory import is_out_of_memory, out_of_memory_as_input_error
from ensemble.machine.timing import time_call
from ensemble.models.outputs import check_single

# How errors of the libraries below torch begin, which are plain RuntimeErrors.
_OF_LIBRARIES = ("CUDA error", "CUDA driver error", "cuDNN error", "cuBLAS error")


@dataclass(frozen=True)
class FirstForward:
    """The seconds of the first forward of a process, of one model; and the logits of one image by
    each of the first models, `(classes,)` each, or what else a model gives for it."""

    seconds: float
    logits: tuple[Tensor, ...]


def run(
    options: ModelOptions, model: nn.Module, image: Tensor, see: Callable[[], list[Tensor]]
) -> FirstForward:
    """Time a forward of `model` on one image `(1, channels, H, W)`; then `see` gives the logits.

    Raises:
        InputError: the architecture does not run with these images, or not on this device; or it
            does not give one tensor.
    """
    with torch.inference_mode():
        try:
            with out_of_memory_as_input_error("the first forward", argument="num_models"):
                first = time_call(
                    lambda: _forward(model, image), synchronize=lambda: synchronize(image.device)
                )
        except InputError:
            raise
        except Exception as error:
            raise _refused(options, image, error) from error
        return FirstForward(first.seconds, tuple(see()))


def _forward(model: nn.Module, image: Tensor) -> Tensor:
    """A forward on the device of the image.

    Raises:
        InputError: the device is at fault, not the model: it is out of memory, or cannot run
            torch's kernels.
    """
    try:
        logits = check_single(model(image))
        synchronize(image.device)
    except RuntimeError as error:
        if image.device.type == "cpu" or not is_of_device(error):
            raise
        message = f"the first forward on {image.device} failed: {first_line(error)}"
        raise InputError(message, argument="device") from error
    return logits


def of_image(output: object) -> Tensor:
    """What a model gives for the only image of a batch: `(classes,)` of `(1, classes)`.

    Raises:
        InputError: the output is not one tensor.
    """
    found = check_single(output)
    return found[0] if found.dim() and len(found) == 1 else found


def _refused(options: ModelOptions, image: Tensor, error: Exception) -> InputError:
    """The error of a model that does not run with an image."""
    reason, channels = first_line(error), count(image.shape[1], "channel")
    if not isinstance(error, RuntimeError | AssertionError | ValueError):  # of the model's own code
        reason = f"{type(error).__name__}: {reason}"
    if f"got {image.shape[1]} channels" in reason:  # of torch's convolution
        message = f"{options.arch} does not take images of {channels}: {reason}"
        return InputError(message, argument="channels")
    message = f"{options.arch} does not run at {image.shape[-1]} px: {reason}"
    return InputError(message, argument="image_size")


def is_of_device(error: RuntimeError) -> bool:
    """Did an accelerator or its libraries cause an error, rather than the model?"""
    if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return True
    return str(error).startswith(_OF_LIBRARIES) or "CUBLAS_STATUS" in str(error)
