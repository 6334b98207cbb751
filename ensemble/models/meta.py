"""The meta device without `torch._dynamo`, which torch imports for what it does there in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ByShape(TorchFunctionMode):
    """Within, meta tensors are stacked and made alike by their shapes, and no random numbers are
    drawn for them.

    The results are those of torch, which would import `torch._dynamo` or sympy, in a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        if func is torch.empty_like and args[0].is_meta:
            x = args[0]
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if func is torch.stack and not kwargs and len(args) == 1 and args[0][0].is_meta:
            return args[0][0].new_empty((len(args[0]), *args[0][0].shape))
        return func(*args, **kwargs)
