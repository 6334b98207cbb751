"""The callable that `build` returns: it checks its input; the caller owns its output."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.compiler.graph.batch_norm_folding import is_close
from ensemble.errors import UnavailableError
from ensemble.machine.devices import synchronize
from ensemble.machine.per_process import PerProcess
from ensemble.machine.precision import Float32Precision, float32_precision
from ensemble.models import stacking
from ensemble.models.outputs import SelectedOutput, describe, is_selectable, unwrapped
from ensemble.strategies.build_result import BuildResult, PerModel, RawForward
from ensemble.strategies.serving import CallGate, held_bytes, weight_bytes
from ensemble.strategies.shape_plans import ShapePlans

_PLAIN = (Tensor, nn.Parameter)


class Forward:
    """`forward(x)`: images -> logits `(N, B, classes)` of N models.

    Every strategy has the same contract.

    - x is `(B, C, H, W)`, a batch shared by all models, or `(N, B, C, H, W)`, one for each. It has
      up to `max_batch` images a model, of any size that the models take, the channels, dtype and
      device of the example, and any strides. It is never written to, even by models that normalize
      their input in place: each model sees the caller's values.
    - A shape that is new is planned in its first call, over the same weights, and its first result
      is compared with that of the first model. `prepare` plans ahead: a smaller batch then takes
      the next prepared one, padded with zeros, and no call waits for a plan.
    - The result is an ordinary tensor that owns its memory and does not require grad. It may be
      modified in place and used for training, but no gradient flows back to x or the models.
    - Models run under `torch.inference_mode`: tensors cached by their code become inference
      tensors, and they cannot compute gradients in their forward.
    - Models run in their own dtype: `torch.autocast` around a build or a call has no effect.
      Tensors that depend on `torch.get_default_dtype` may have the default of the build.
    - Calls from several threads are right, if the models' own code is thread-safe. Those of
      `lowered_vmap`, `vmap`, `cudagraph_...` and of other runtimes take turns; others run side by
      side.
    - `replace` exchanges a model between two calls.
    - It is bound to its process: it cannot be pickled, copied, traced or forked while it runs;
      `ensemble.save` writes it to a file.

    Attributes:
        strategy: the name that it was built by; `report.strategy` is what an autotuner chose.
        num_models: N.
        max_batch: the largest number of images a model.
        shape, dtype, device: of the example.
        report: how it was built.
        plans, serving: what `ensemble.save` reads.

    Raises (on call):
        ValueError: x has other channels, dtype or device than the example, too many images, or
            requires grad; the models do not return a single tensor each, or their outputs differ in
            shape or dtype.
        UnavailableError: the strategy does not support these models, or inputs of this shape; the
            message is one line.
        Exception: any error of the models for this x.
    """

    def __init__(
        self,
        built: BuildResult,
        strategy: str,
        example: Tensor,
        *,
        num_models: int,
        model: nn.Module | None,
        max_batch: int | None = None,
        is_verified: bool = False,
    ) -> None:
        """built: with `Serving`.
        model: the first one, or a copy of it; None if its code is not there.
        is_verified: compare the first result of a new shape with that of `model`."""
        assert built.serving is not None
        self.strategy, self.num_models, self._built = strategy, num_models, built
        self.serving, self._is_verified = built.serving, is_verified
        self.shape, self.dtype, self.device = tuple(example.shape), example.dtype, example.device
        self.max_batch = self.shape[-4] if max_batch is None else max_batch
        self._type = type(example)
        self.__name__ = f"{strategy}_forward"  # torch.jit requires one
        self.plans = ShapePlans(
            built.forward,
            self.shape,
            plan=self.serving.plan,
            replan=self.serving.replan,
            plans_in_seconds=self.serving.plans_in_seconds,
            model=model,
            is_verified=is_verified,
        )
        self._gate = PerProcess(CallGate)
        self.exchanges = PerProcess(threading.Lock)  # one at a time, and none while it is saved

    def __call__(self, x: Tensor) -> Tensor:
        self._check_not_traced()
        check_no_parametrization_cache()
        x = self._checked(x)
        with self._gate(), execution_context(self.device):
            return stack_outputs(self.plans(x), self.num_models)

    @property
    def raw(self) -> RawForward:
        """The run of the builder, for inputs like the example."""
        return self._built.forward

    def prepare(self, shapes: Iterable[int | Sequence[int]]) -> None:
        """Plan for inputs of these shapes, which then take no time for it.

        Args:
            shapes: batch sizes, for images like the example; or whole shapes, `(B, C, H, W)` or
                `(N, B, C, H, W)`.

        Raises:
            ValueError: a shape that no input may have.
            UnavailableError: the strategy does not support inputs of a shape.
        """
        for shape in _shapes(shapes):
            full = _with_batch(self.shape, shape) if isinstance(shape, int) else shape
            self._check_shape(full)
            x = noise(full, self.dtype, self.device)
            with self._gate(), execution_context(self.device), default_device(self.device):
                self.plans.prepare(x)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of inputs that need no planning."""
        return self.plans.shapes

    def replace(self, index: int, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Exchange a model while others serve: the next call uses its weights, and no call sees a
        part of them. The other models are untouched.

        The weights are transformed and packed while calls go on. Then calls wait for as long as the
        values are copied and one call is compared with the new model.

        Args:
            index: of the model, from 0.
            model: one of the same architecture in eval mode, or its `state_dict()`.

        Raises:
            ValueError: no such index; the model or its weights do not fit.
            UnavailableError: the outputs are not those of the new model: the old one stays.
        """
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if not is_index or not 0 <= index < self.num_models:
            raise ValueError(f"index: expected 0 to {self.num_models - 1}, got {index!r}")
        if not isinstance(model, nn.Module | Mapping):
            got = type(model).__name__
            raise ValueError(f"model: expected a module or a state dict, got {got}")
        with self.exchanges(), execution_context(self.device), default_device(self.device):
            new = self._new_model(index, model)
            x = noise(self.shape, self.dtype, self.device)
            one = x[index] if x.dim() == 5 else x
            expected = stacking.private_copy(new)(one.clone()) if self._is_verified else None
            commit = self.serving.stage(index, new, x)
            with self._gate().closed():
                synchronize(self.device)
                undo = commit()
                try:
                    found = stack_outputs(self.plans(x), self.num_models)[index]
                    synchronize(self.device)
                    if not is_close(found, expected):
                        raise UnavailableError(
                            f"{self.strategy} disagrees with the new model, so the old one stays;"
                            " build another forward"
                        )
                except BaseException:
                    undo()
                    raise
                if index == 0:
                    self.plans.model = stacking.private_copy(new)

    @property
    def memory_bytes(self) -> int | None:
        """Memory of weights and intermediate values that are held between calls; None where another
        runtime holds them."""
        return held_bytes([self.serving])

    @property
    def bytes_per_model(self) -> int | None:
        """What one more model would add to `memory_bytes`: its weights, as transformed and packed.
        Intermediate values are of one model at a time, or are not held."""
        weights = weight_bytes([self.serving])
        return None if weights is None else weights // self.num_models

    @property
    def report(self) -> Report:
        """How it was built."""
        built, choice = self._built, self._built.choice
        notes = (built.note, built.details, built.deferred_note())
        return Report(
            strategy=choice.name if choice else self.strategy,
            times_s=dict(choice.times_s) if choice else {},
            errors=dict(choice.errors) if choice else {},
            kernels=dict(built.kernels),
            notes=tuple(filter(None, notes)),
            memory_bytes=self.memory_bytes,
        )

    def __repr__(self) -> str:
        images = f"{_with_batch(self.shape, self.max_batch)} in {self.dtype} on {self.device}"
        name = self.report.strategy
        picked = "" if name == self.strategy else f", picked {name}"
        first = self.plans.model
        output = f", output={first.output!r}" if isinstance(first, SelectedOutput) else ""
        again = f"ensemble.build({name!r}, models, example, max_batch={self.max_batch}{output})"
        return (
            f"<{self.strategy} forward of {self.num_models} models{picked}, x up to {images};"
            f" without tuning: {again}>"
        )

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
        if not isinstance(x, Tensor):
            raise ValueError(f"x: expected a tensor, got {type(x).__name__}")
        if tuple(x.shape) != self.shape:
            self._check_shape(tuple(x.shape))
        if x.dtype != self.dtype or x.device != self.device:
            raise ValueError(
                f"x: expected a tensor in {self.dtype} on {self.device}, like the example that"
                f" {self.strategy} was built with; got one in {x.dtype} on {x.device}"
            )
        if type(x) in _PLAIN or type(x) is not self._type:  # else both are fake tensors
            x = to_plain_tensor(x, argument="x")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x: expected a tensor that does not require grad, as a built forward is not"
                " differentiable; call it under torch.no_grad() or with x.detach()"
            )
        return x

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a shape that no input may have."""
        channels = self.shape[-3]
        expected = f"(B, {channels}, H, W) or ({self.num_models}, B, {channels}, H, W)"
        is_per_model = len(shape) == 5 and shape[0] == self.num_models
        is_empty = any(size < 1 for size in shape)
        if not (is_per_model or len(shape) == 4) or shape[-3] != channels or is_empty:
            raise ValueError(f"x: expected shape {expected}, got {shape}")
        if shape[-4] > self.max_batch:
            raise ValueError(
                f"x: expected up to {self.max_batch} images a model, got {shape[-4]}; build the"
                f" forward with max_batch={shape[-4]}"
            )

    def _new_model(self, index: int, model: nn.Module | Mapping[str, Tensor]) -> nn.Module:
        """A model that takes a place, checked; of a state dict, a copy of the first model with it.

        Raises:
            ValueError: it does not fit.
        """
        first = self.plans.model
        if first is None:
            raise UnavailableError(
                "this forward was loaded from a file, without the code of its models; build one to"
                " replace models"
            )
        output = first.output if isinstance(first, SelectedOutput) else None
        if not isinstance(model, nn.Module):
            new = stacking.with_state(unwrapped(first), model)
            return new if output is None else SelectedOutput(new, output)
        if output is not None and not isinstance(model, SelectedOutput):
            model = SelectedOutput(model, output)
        if self.serving.is_same_architecture:
            stacking.check_same_architecture([first, model])
        return model


@dataclass(frozen=True)
class Report:
    """How a forward was built.

    Attributes:
        strategy: that runs; of `best`, what it chose.
        times_s: seconds per call of the candidates of an autotuner, all of one run.
        errors: why other candidates were not tried or were rejected.
        kernels: the number of steps by kind, of `lowered_vmap`.
        notes: of the build.
        memory_bytes: see `Forward.memory_bytes`.
    """

    strategy: str
    times_s: Mapping[str, float]
    errors: Mapping[str, str]
    kernels: Mapping[str, int]
    notes: tuple[str, ...]
    memory_bytes: int | None


def _shapes(shapes: object) -> Iterator[int | tuple[int, ...]]:
    """Batch sizes and shapes; raises ValueError for anything else."""
    every: Iterable[Any] = shapes if isinstance(shapes, Iterable) else (None,)
    for shape in every:
        if type(shape) is int:
            yield shape
            continue
        is_sequence = isinstance(shape, Sequence) and not isinstance(shape, str)
        if is_sequence and all(type(size) is int for size in shape):
            yield tuple(shape)
            continue
        raise ValueError(f"shapes: expected batch sizes or whole shapes, got {shapes!r}")


def _with_batch(shape: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
    return (*shape[:-4], batch_size, *shape[-3:])


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images to compare outputs on."""
    generator = torch.Generator(device).manual_seed(0)  # not the global generator
    options: Any = {"dtype": dtype, "device": device, "generator": generator}
    if dtype.is_floating_point:
        return torch.randn(shape, **options)
    return torch.randint(0, 2 if dtype == torch.bool else 128, shape, **options)


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
        check_dense(outputs, is_stacked=True)
        assert isinstance(outputs, Tensor)
        if outputs.dim() == 0 or len(outputs) != num_models:
            found = tuple(outputs.shape)
            raise ValueError(f"expected outputs of {num_models} models, got shape {found}")
        ordinary: Tensor = outputs if _has_own_dispatch(outputs) else outputs.as_subclass(Tensor)
        return ordinary.clone(memory_format=torch.contiguous_format)


def _has_own_dispatch(tensor: Tensor) -> bool:
    """Whether its class overrides `__torch_dispatch__`, as fake tensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


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
        tensors.append(output if _has_own_dispatch(output) else output.as_subclass(Tensor))
    return tensors
