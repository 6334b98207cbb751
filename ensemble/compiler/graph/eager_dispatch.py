"""What a model's eager forward dispatches to, which neither its code nor a trace shows.

torch selects fused attention kernels at run time, and never while a trace or a function mode is
active. The precision of its norms depends on the memory format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensemble.machine import captured_warnings

Predicate = Callable[[str, Mapping[str, Any]], bool]  # operator, its arguments by name

_FUSED_ATTENTION = ("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd")
_ATTENTION_MASK = 0  # `mask_type` of an attention mask, as opposed to one of padded keys


def dispatches(model: nn.Module, x: Tensor, predicate: Predicate) -> bool:
    """Does a call of the model with x dispatch to an operator that fulfils the predicate?

    The model may mutate x and itself.
    """
    search = _Search(predicate)
    with captured_warnings.capture("ignore"), torch.no_grad(), search:
        model(x)
    return search.found


def masks_padding(name: str, arguments: Mapping[str, Any]) -> bool:
    """A fused attention kernel with a padding mask. With it torch selects kernels by the values of
    the mask (nested tensors), and fully masked rows differ from those of the plain operators."""
    if name.startswith("aten::_nested_tensor_from_mask"):
        return True
    has_mask = name in _FUSED_ATTENTION and arguments.get("mask") is not None
    return has_mask and arguments.get("mask_type") != _ATTENTION_MASK


def normalizes_channels_last(name: str, arguments: Mapping[str, Any]) -> bool:
    """A norm that computes statistics of channels-last images. torch's kernels then sum squares in
    float32: if the mean is 1000 times the standard deviation, no digit is left."""
    if name in ("aten::group_norm", "aten::native_group_norm"):
        return _is_channels_last(arguments["input"])
    is_batch_norm = "batch_norm" in name and "backward" not in name
    if not is_batch_norm or not arguments.get("training", "no_stats" in name):
        return False
    return _is_channels_last(arguments["input"])


def _is_channels_last(x: Tensor) -> bool:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not x.is_contiguous()


class _Search(TorchDispatchMode):
    def __init__(self, predicate: Predicate) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._predicate, self.found = predicate, False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not self.found:
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.found = self._predicate(func._schema.name, arguments)
        return func(*args, **(kwargs or {}))
