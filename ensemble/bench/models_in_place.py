"""The models and the example of a case as they are measured: on its device, in its dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble.bench.case import Case
from ensemble.bench.setup import make_example
from ensemble.bench.workload import Workload
from ensemble.models import stacking


def models_in_place(
    workload: Workload, case: Case, dtype: torch.dtype
) -> tuple[Sequence[nn.Module], Tensor]:
    """N models, and images `(B, C, px, px)` or `(N, B, C, px, px)`."""
    models, device = workload.models[: case.num_models], workload.device
    images = workload.images(case.image_size)
    example = make_example(images, case).to(device, dtype)
    if dtype == torch.float32 and images.device == device:
        return models, example
    state = {
        name: stack.to(device, dtype if stack.is_floating_point() else stack.dtype)
        for name, stack in stacking.stacked_state(models).items()
    }
    return stacking.from_stack(stacking.skeleton(models[0]), state), example
