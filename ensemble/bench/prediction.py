"""What the models see in the plain image: the classes, or else the shape, of the first forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ensemble.bench.config import ModelOptions
from ensemble.bench.workload import Workload
from ensemble.models import images
from ensemble.models.architectures import is_users
from ensemble.models.outputs import class_count, is_class_logits


def predict(
    models: ModelOptions, workload: Workload, *, verbose: bool, say: Callable[[str], None]
) -> float:
    """Tell what the first model, or each model of several files, sees in the plain image.

    Returns the seconds of the first forward, which is the first of its process.

    Raises:
        InputError: the architecture does not run with these images, or not on this device.
    """
    paths, found = models.model_path or (), workload.first_forward(models)
    classes = class_count(workload.models[0])
    names = None if classes is None or is_users(models.arch) else images.labels(classes)
    for index, logits in enumerate(found.logits):
        source = f" ({paths[index]})" if len(paths) > 1 else ""
        if is_class_logits(logits[None, None], classes):
            for line in _classes(logits, names, 5 if verbose else 1):
                say(line + source)
        else:
            say(f"Prediction: output of shape {tuple(logits.shape)}{source}")
    return found.seconds


def _classes(logits: Tensor, names: list[str] | None, count: int) -> list[str]:
    """The best classes of one image, a line each."""
    probabilities = logits.softmax(0)
    top = probabilities.topk(min(count, len(logits)))
    lines = []
    for rank, (probability, label) in enumerate(zip(*map(list, top), strict=True)):
        name = f"{int(label)} {names[int(label)]}" if names else f"class {int(label)}"
        lead = "Prediction" if rank == 0 else f"  top {rank + 1}"
        lines.append(f"{lead}: {name}, probability {float(probability):.3f}")
    return lines
