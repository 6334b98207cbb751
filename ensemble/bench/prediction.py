"""What the models see in the plain image: the classes of the first forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ensemble.bench.config import ModelOptions
from ensemble.bench.workload import Workload
from ensemble.models import images


def predict(
    models: ModelOptions, workload: Workload, *, verbose: bool, say: Callable[[str], None]
) -> float:
    """Tell what the first model, or each model of several files, sees in the plain image.

    Returns the seconds of the first forward, which is the first of its process.

    Raises:
        InputError: the architecture does not run at this image size, or not on this device.
    """
    paths, found = models.model_path or (), workload.first_forward(models)
    for index, logits in enumerate(found.logits):
        source = f" ({paths[index]})" if len(paths) > 1 else ""
        for line in _classes(logits, 5 if verbose else 1):
            say(line + source)
    return found.seconds


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
