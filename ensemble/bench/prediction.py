"""What the models see in the plain image: the first forward of the process, and its classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensemble.bench.config import ModelOptions
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, first_line
from ensemble.machine.devices import synchronize
from ensemble.machine.memory import out_of_memory_as_input_error
from ensemble.machine.timing import time_call
from ensemble.models import images


def predict(
    models: ModelOptions, workload: Workload, *, verbose: bool, say: Callable[[str], None]
) -> float:
    """Tell what the first model, or each model of several files, sees in the plain image.

    Returns the seconds of the first forward, which is the first of the whole process.

    Raises:
        InputError: the architecture does not run at this image size.
    """
    px, paths = models.image_size[0], models.model_path or ()
    image = workload.images(px)[:1]
    with torch.inference_mode():
        try:
            with out_of_memory_as_input_error("the first forward", argument="num_models"):
                first = time_call(
                    lambda: workload.models[0](image), synchronize=lambda: synchronize(image.device)
                )
        except InputError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            message = f"{models.arch} does not run at {px} px: {first_line(error)}"
            raise InputError(message, argument="image_size") from error
        for index, logits in enumerate(workload.see(image, max(1, len(paths)))):
            source = f" ({paths[index]})" if len(paths) > 1 else ""
            for line in _classes(logits, 5 if verbose else 1):
                say(line + source)
    return first.seconds


def _classes(logits: Tensor, count: int) -> list[str]:
    """The best classes of one image, a line each."""
    names, probabilities = images.labels(len(logits)), logits.softmax(0)
    top = probabilities.topk(min(count, len(logits)))
    lines = []
    for rank, (probability, label) in enumerate(zip(*map(list, top), strict=True)):
        name = f"{int(label)} {names[int(label)]}" if names else f"class {int(label)}"
        lead = "Prediction" if rank == 0 else f"  top {rank + 1}"
        lines.append(f"{lead}: {name}, probability {float(probability):.3f}")
    return lines
