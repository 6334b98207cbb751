"""What `build` returns: a forward that checks its input first and owns what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.errors import UnavailableError
from ensemble.strategies.build_result import PerModel, Run

_PLAIN = (Tensor, nn.Parameter)


class Forward:
    """`forward(x)`: x like the example it was built with -> logits `(N, B, classes)`.

    Every strategy has the same contract.

    - x has the example's shape, dtype and device; its strides are free. It is never written to,
      even by models that normalize their input in place: each model gets the caller's values.
    - The result is an ordinary tensor in memory of its own, without a gradient: it may be changed
      in place and trained on, but nothing flows back to x or to the models.
    - Models run under `torch.inference_mode`: what their code caches then holds inference tensors,
      and gradients within a forward cannot be had.
    - Models run in their own dtype: `torch.autocast` around a build or a call has no effect. What
      their code forms by `torch.get_default_dtype` may have that of the build.
    - Calls from several threads are safe where the models' own code is.
    - It belongs to its process: it cannot be pickled, copied, exported or traced. Build it where
      it is to run.

    Raises (on call):
        ValueError: x is not like the example, or requires a gradient; the models give no single
            tensor each, or differ in shape or dtype of their outputs.
        UnavailableError: the strategy cannot run these models, with the reason in one line.
        Exception: whatever the models themselves raise for this x.
    """

    def __init__(self, run: Run, strategy: str, example: Tensor, num_models: int) -> None:
        self.run, self.strategy, self.num_models = run, strategy, num_models
        self.shape, self.dtype, self.device = tuple(example.shape), example.dtype, example.device
        self._type = type(example)
        self.__name__ = f"{strategy}_forward"  # torch.jit asks for one before it calls

    def __call__(self, x: Tensor) -> Tensor:
        self._refuse_tracing()
        refuse_cached_parametrizations()
        x = self._checked(x)
        with settings(self.device):
            return owned(self.run(x), self.num_models)

    def __repr__(self) -> str:
        example = f"{self.shape} in {self.dtype} on {self.device}"
        return f"<{self.strategy} forward of {self.num_models} models, x: {example}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a built forward cannot be pickled or copied: it holds threads and memory of this"
            " process; send the models and call ensemble.build there"
        )

    def _refuse_tracing(self) -> None:
        traced = is_traced(is_plain=self._type in _PLAIN)
        if torch._C._get_tracing_state() or torch.compiler.is_compiling() or traced:
            raise UnavailableError(
                f"a built forward ({self.strategy}) cannot be traced, exported or compiled: it"
                " runs outside of torch's graph; export or compile the models themselves"
            )

    def _checked(self, x: object) -> Tensor:
        """x as a plain tensor.

        Raises:
            ValueError: x is not like the example, or not a tensor to compute with here.
        """
        expected = f"x: expected a tensor of shape {self.shape} in {self.dtype} on {self.device}"
        like = f"like the example that {self.strategy} was built with"
        advice = "build another forward with an example like x"
        if not isinstance(x, Tensor):
            raise ValueError(f"{expected}, {like}; found a {type(x).__name__}")
        if tuple(x.shape) != self.shape or x.dtype != self.dtype or x.device != self.device:
            found = f"shape {tuple(x.shape)} in {x.dtype} on {x.device}"
            raise ValueError(f"{expected}, {like}; found {found}; {advice}")
        if type(x) in _PLAIN or type(x) is not self._type:  # else fake, like the example
            x = plain(x, argument="x")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x: expected a tensor that does not require a gradient, for none flows through a"
                " built forward; call it under torch.no_grad() or with x.detach()"
            )
        return x


def is_traced(*, is_plain: bool) -> bool:
    """Are calls within a mode that records what torch's operators do, or replaces it?

    is_plain: they are of ordinary tensors, which a mode of fake tensors refuses.
    """
    keys = torch._C._TorchDispatchModeKey
    wrong = [keys.PROXY, keys.FUNCTIONAL, *[keys.FAKE] * is_plain]
    return any(torch._C._get_dispatch_mode(key) is not None for key in wrong)


def plain(x: Tensor, *, argument: str) -> Tensor:
    """x as a tensor of torch's own class, of strided memory that holds its values.

    Raises:
        ValueError: a sparse, nested or quantized tensor, one of a class that computes in its own
            way (a fake tensor, say), or one within a transform of `torch.func`.
    """
    kind = type(x)
    if kind not in _PLAIN and _is_special(x):
        raise ValueError(f"{argument}: expected a plain tensor, found a {kind.__name__}")
    x = x if kind in _PLAIN else x.as_subclass(Tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(
            f"{argument}: expected a plain tensor, found one within a torch.func transform; call"
            " the models themselves there"
        )
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise ValueError(f"{argument}: expected a dense tensor, found layout {x.layout}")
    if x.is_neg() or x._is_zerotensor():
        x = x.clone()  # kernels read the memory, not what torch makes of it
    return x


def refuse_cached_parametrizations() -> None:
    """Its cache knows a weight by its module and name, and several models run one module here.

    Raises:
        UnavailableError: the caller is within `torch.nn.utils.parametrize.cached()`.
    """
    if parametrize._cache_enabled:
        raise UnavailableError(
            "models cannot be built or called together within torch.nn.utils.parametrize.cached():"
            " its cache would give one model's weights to others"
        )


@contextlib.contextmanager
def settings(device: torch.device) -> Iterator[None]:
    """What models are built and called in, whatever the caller is in: no gradients, no autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for kind in dict.fromkeys((device.type, "cpu")):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def owned(outputs: Any, num_models: int) -> Tensor:
    """The outputs of N models as one ordinary tensor, in memory that nobody else has.

    Raises:
        ValueError: the models give no single tensor each, or differ in its shape or dtype.
    """
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(outputs, PerModel):
            return torch.stack(_alike(outputs.outputs)).contiguous()
        check_dense(outputs)
        assert isinstance(outputs, Tensor)
        if outputs.dim() == 0 or len(outputs) != num_models:
            found = tuple(outputs.shape)
            raise ValueError(f"expected outputs of {num_models} models, found shape {found}")
        ordinary: Tensor = outputs if _is_special(outputs) else outputs.as_subclass(Tensor)
        return ordinary.clone(memory_format=torch.contiguous_format)


def _is_special(tensor: Tensor) -> bool:
    """Is it of a class that computes in its own way, as fake tensors are?"""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def no_tensor(output: object) -> str:
    """What is wrong with an output of a model that is not a tensor."""
    return f"expected one tensor from each model, found {type(output).__name__}"


def check_dense(output: object) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(no_tensor(output))
    if output.layout != torch.strided or output.is_quantized or output.is_nested:
        raise ValueError(f"expected one dense tensor from each model, found {output.layout}")


def _alike(outputs: Sequence[object]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for index, output in enumerate(outputs):
        check_dense(output)
        assert isinstance(output, Tensor)
        first = tensors[0] if tensors else output
        if (output.shape, output.dtype) != (first.shape, first.dtype):
            expected, found = (f"{tuple(t.shape)} in {t.dtype}" for t in (first, output))
            raise ValueError(
                f"models: expected outputs of one shape and dtype, found {expected} from model 0"
                f" and {found} from model {index}"
            )
        tensors.append(output if _is_special(output) else output.as_subclass(Tensor))
    return tensors
