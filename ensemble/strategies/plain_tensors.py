"""Which tensors, in which surroundings, a build and a call accept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.errors import UnavailableError

PLAIN = (Tensor, nn.Parameter)


def is_traced(*, is_plain: bool) -> bool:
    """Whether a dispatch mode is active that records or replaces torch's operators.

    is_plain: the inputs are ordinary tensors, which FakeTensorMode does not accept.
    """
    keys = torch._C._TorchDispatchModeKey
    unsupported = [keys.PROXY, keys.FUNCTIONAL, *[keys.FAKE] * is_plain]
    return any(torch._C._get_dispatch_mode(key) is not None for key in unsupported)


def to_plain_tensor(x: Tensor, *, argument: str) -> Tensor:
    """x as a `torch.Tensor`, strided and without lazy negation.

    Raises:
        ValueError: x is sparse, nested or quantized, a subclass with `__torch_dispatch__` (such as
            a fake tensor), or wrapped by a `torch.func` transform.
    """
    kind = type(x)
    if kind not in PLAIN and has_own_dispatch(x):
        raise ValueError(f"{argument}: expected a plain tensor, got {kind.__name__}")
    x = x if kind in PLAIN else x.as_subclass(Tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(
            f"{argument}: expected a plain tensor, got one wrapped by a torch.func transform; call"
            " the models directly inside transforms"
        )
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise ValueError(f"{argument}: expected a dense tensor, got layout {x.layout}")
    if x.is_neg() or x._is_zerotensor():
        x = x.clone()  # materialize: kernels read the memory directly
    return x


def check_no_parametrization_cache() -> None:
    """The parametrization cache is keyed by module and name, but here N models share a module.

    Raises:
        UnavailableError: called inside `torch.nn.utils.parametrize.cached()`.
    """
    if parametrize._cache_enabled:
        raise UnavailableError(
            "ensemble.build cannot be combined with torch.nn.utils.parametrize.cached(): its cache"
            " would return one model's weights for another"
        )


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether its class overrides `__torch_dispatch__`, as fake tensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
