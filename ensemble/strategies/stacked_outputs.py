"""The outputs of N models as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemble.models.outputs import describe, is_selectable
from ensemble.strategies.build_result import PerModel
from ensemble.strategies.plain_tensors import has_own_dispatch


def stack_outputs(outputs: Any, num_models: int) -> Tensor:
    """The outputs of N models as one ordinary tensor `(N, ...)` that owns its memory.

    Raises:
        ValueError: the models do not return a single dense tensor each, or their outputs differ in
            shape or dtype.
    """
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(outputs, PerModel):
            return torch.stack(_same_shape(outputs.outputs)).contiguous()
        check_dense(outputs, is_stacked=True)
        assert isinstance(outputs, Tensor)
        if outputs.dim() == 0 or len(outputs) != num_models:
            found = tuple(outputs.shape)
            raise ValueError(f"expected outputs of {num_models} models, got shape {found}")
        ordinary: Tensor = outputs if has_own_dispatch(outputs) else outputs.as_subclass(Tensor)
        return ordinary.clone(memory_format=torch.contiguous_format)


def check_dense(output: object, *, is_stacked: bool = False) -> None:
    """Raise ValueError unless a model's output, or those of N models, is a dense tensor."""
    if not isinstance(output, Tensor):
        found = describe(output, is_stacked=is_stacked)
        advice = "; select one by output=" if is_selectable(output) else ""
        raise ValueError(f"expected one tensor from each model, got {found}{advice}")
    if output.layout != torch.strided or output.is_quantized or output.is_nested:
        raise ValueError(f"expected one dense tensor from each model, got {output.layout}")


def _same_shape(outputs: Sequence[object]) -> list[Tensor]:
    """The outputs as tensors; raises ValueError unless they have one shape and dtype."""
    tensors: list[Tensor] = []
    for index, output in enumerate(outputs):
        check_dense(output)
        assert isinstance(output, Tensor)
        first = tensors[0] if tensors else output
        if (output.shape, output.dtype) != (first.shape, first.dtype):
            expected, found = (f"{tuple(t.shape)} in {t.dtype}" for t in (first, output))
            raise ValueError(
                f"models: expected outputs of one shape and dtype, got {expected} from model 0"
                f" and {found} from model {index}"
            )
        tensors.append(output if has_own_dispatch(output) else output.as_subclass(Tensor))
    return tensors
