"""The callable that `build` returns: it checks its input; the caller owns its output."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import is_close
from ensemble.errors import UnavailableError
from ensemble.machine.devices import synchronize
from ensemble.machine.per_process import PerProcess
from ensemble.models import stacking
from ensemble.models.outputs import SelectedOutput, unwrapped
from ensemble.strategies.agreement import noise
from ensemble.strategies.build_result import BuildResult, RawForward
from ensemble.strategies.call_gate import CallGate
from ensemble.strategies.contexts import default_device, execution_context
from ensemble.strategies.plain_tensors import (
    PLAIN,
    check_no_parametrization_cache,
    is_traced,
    to_plain_tensor,
)
from ensemble.strategies.serving import held_bytes, weight_bytes
from ensemble.strategies.shape_plans import ShapePlans
from ensemble.strategies.stacked_outputs import stack_outputs


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
        traced = is_traced(is_plain=self._type in PLAIN)
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
        if type(x) in PLAIN or type(x) is not self._type:  # else both are fake tensors
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
