"""Operations on the meta device without importing `torch._dynamo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MetaWithoutDynamo(TorchFunctionMode):
    """Compute `stack` and `empty_like` of meta tensors from their shapes, and skip random
    initialization.

    The results are those of torch, whose Python meta kernels import `torch._dynamo` or sympy, which
    takes a second.
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
