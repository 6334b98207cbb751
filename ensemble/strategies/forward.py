"""The callable that `build` returns: it checks its input; the caller owns its output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.errors import UnavailableError
from ensemble.machine.precision import Float32Precision, float32_precision
from ensemble.strategies.build_result import PerModel, RawForward

_PLAIN = (Tensor, nn.Parameter)


class Forward:
    """`forward(x)`: x like the example it was built with -> logits `(N, B, classes)`.

    Every strategy has the same contract.

    - x has the example's shape, dtype and device, and any strides. It is never written to, even by
      models that normalize their input in place: each model sees the caller's values.
    - The result is an ordinary tensor that owns its memory and does not require grad. It may be
      modified in place and used for training, but no gradient flows back to x or the models.
    - Models run under `torch.inference_mode`: tensors cached by their code become inference
      tensors, and they cannot compute gradients in their forward.
    - Models run in their own dtype: `torch.autocast` around a build or a call has no effect.
      Tensors that depend on `torch.get_default_dtype` may have the default of the build.
    - Calls from several threads are safe if the models' own code is thread-safe.
    - It is bound to its process: it cannot be pickled, copied, exported or traced.

    Raises (on call):
        ValueError: x is not like the example, or requires grad; the models do not return a single
            tensor each, or their outputs differ in shape or dtype.
        UnavailableError: the strategy does not support these models; the message is one line.
        Exception: any error of the models for this x.
    """

    def __init__(self, run: RawForward, strategy: str, example: Tensor, num_models: int) -> None:
        self.run, self.strategy, self.num_models = run, strategy, num_models
        self.shape, self.dtype, self.device = tuple(example.shape), example.dtype, example.device
        self._type = type(example)
        self.__name__ = f"{strategy}_forward"  # torch.jit requires one

    def __call__(self, x: Tensor) -> Tensor:
        self._check_not_traced()
        check_no_parametrization_cache()
        x = self._checked(x)
        with execution_context(self.device):
            return stack_outputs(self.run(x), self.num_models)

    def __repr__(self) -> str:
        example = f"{self.shape} in {self.dtype} on {self.device}"
        return f"<{self.strategy} forward of {self.num_models} models, x: {example}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a built forward cannot be pickled or copied, as it holds threads and memory of this"
            " process; send the models and call ensemble.build there"
        )

    def _check_not_traced(self) -> None:
        traced = is_traced(is_plain=self._type in _PLAIN)
        if torch._C._get_tracing_state() or torch.compiler.is_compiling() or traced:
            raise UnavailableError(
                f"a built forward ({self.strategy}) cannot be traced, exported or compiled; export"
                " or compile the models instead"
            )

    def _checked(self, x: object) -> Tensor:
        """x as a plain tensor.

        Raises:
            ValueError: x is not like the example, or not a dense tensor without grad.
        """
        expected = f"x: expected a tensor of shape {self.shape} in {self.dtype} on {self.device}"
        like = f"like the example that {self.strategy} was built with"
        advice = "build another forward with an example like x"
        if not isinstance(x, Tensor):
            raise ValueError(f"{expected}, {like}; got {type(x).__name__}")
        if tuple(x.shape) != self.shape or x.dtype != self.dtype or x.device != self.device:
            found = f"shape {tuple(x.shape)} in {x.dtype} on {x.device}"
            raise ValueError(f"{expected}, {like}; got {found}; {advice}")
        if type(x) in _PLAIN or type(x) is not self._type:  # else both are fake tensors
            x = to_plain_tensor(x, argument="x")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x: expected a tensor that does not require grad, as a built forward is not"
                " differentiable; call it under torch.no_grad() or with x.detach()"
            )
        return x


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
    if kind not in _PLAIN and _has_own_dispatch(x):
        raise ValueError(f"{argument}: expected a plain tensor, got {kind.__name__}")
    x = x if kind in _PLAIN else x.as_subclass(Tensor)
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


@contextlib.contextmanager
def execution_context(device: torch.device) -> Iterator[None]:
    """The context that models are built and called in: inference mode, no autocast, and `device`
    is the current one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.type != "cpu":
            stack.enter_context(current_device(device))
        for kind in dict.fromkeys((device.type, "cpu")):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which streams, events and graphs are by default made on `device`.

    Tensors of a device that is not there are fake.
    """
    if device.index is None or not torch.accelerator.is_available():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def ieee_products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which results are computed that others are compared with: CUDA multiplies in
    IEEE float32, whatever the caller has set."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return float32_precision(Float32Precision.IEEE)


def default_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which tensors are made on `device` by default.

    No context unless the caller has set another default: each is a function mode, under which torch
    takes other paths, such as plain instead of fused attention.
    """
    try:
        is_default = torch.get_default_device().type == device.type
    except RuntimeError:  # it makes a tensor there, which fails for a device without a driver
        is_default = False
    return contextlib.nullcontext() if is_default else device


def stack_outputs(outputs: Any, num_models: int) -> Tensor:
    """The outputs of N models as one ordinary tensor `(N, ...)` that owns its memory.

    Raises:
        ValueError: the models do not return a single dense tensor each, or their outputs differ in
            shape or dtype.
    """
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(outputs, PerModel):
            return torch.stack(_same_shape(outputs.outputs)).contiguous()
        check_dense(outputs)
        assert isinstance(outputs, Tensor)
        if outputs.dim() == 0 or len(outputs) != num_models:
            found = tuple(outputs.shape)
            raise ValueError(f"expected outputs of {num_models} models, got shape {found}")
        ordinary: Tensor = outputs if _has_own_dispatch(outputs) else outputs.as_subclass(Tensor)
        return ordinary.clone(memory_format=torch.contiguous_format)


def _has_own_dispatch(tensor: Tensor) -> bool:
    """Whether its class overrides `__torch_dispatch__`, as fake tensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_dense(output: object) -> None:
    """Raise ValueError unless a model's output is a dense tensor."""
    if not isinstance(output, Tensor):
        raise ValueError(f"expected one tensor from each model, got {type(output).__name__}")
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
        tensors.append(output if _has_own_dispatch(output) else output.as_subclass(Tensor))
    return tensors
