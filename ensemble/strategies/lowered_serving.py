"""`lowered_vmap` after its build: programs for further shapes, and the exchange of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor, fx, nn

from ensemble.compiler.pipeline import CompiledForward, compile_for_shape
from ensemble.compiler.runtime import serial_copy
from ensemble.compiler.runtime.program import Program
from ensemble.compiler.runtime.rebatching import rebatched
from ensemble.models import stacking
from ensemble.strategies.build_result import RawForward
from ensemble.strategies.serving import Commit, Undo, write_in_place


@dataclass(frozen=True, eq=False)
class Traced:
    """A compiled forward, and the shape of its input, `(..., B, C, H, W)`."""

    found: CompiledForward
    shape: tuple[int, ...]


class CompiledModels:
    """The compiled forwards of N models over the same packed weights.

    One for another batch size has the same steps, of more or fewer images: it is planned in
    milliseconds. One for another size of images is traced anew. They live as long as a caller holds
    them; the first one always.
    """

    def __init__(
        self, found: CompiledForward, example: Tensor, num_models: int, threads: int
    ) -> None:
        self._first = Traced(found, tuple(example.shape))
        self._num_models, self._threads = num_models, threads
        self._traced, self._modules = WeakSet([self._first]), WeakSet[fx.GraphModule]()
        self._modules.add(found.forward)

    def plan(self, model: nn.Module, x: Tensor) -> RawForward:
        """A forward for inputs like x; see `Serving`.

        Raises:
            UnavailableError: see `compile_for_shape`.
        """
        for traced in list(self._traced):
            if traced.shape[-3:] == x.shape[-3:]:
                module = traced.found.forward
                images = traced.shape[-4], x.shape[-4]
                if resized := rebatched(module, self._num_models, *images):
                    return self._forward(resized, traced)
        found = compile_for_shape(
            model,
            x,
            self._first.found.weights,
            num_models=self._num_models,
            threads=self._threads,
        )
        traced = Traced(found, tuple(x.shape))
        self._traced.add(traced)
        return self._forward(found.forward, traced)

    def _forward(self, module: fx.GraphModule, traced: Traced) -> RawForward:
        """The forward of a module, which keeps the trace that it derives from."""
        self._modules.add(module)
        run = on_contiguous(module)

        def forward(x: Tensor) -> Any:
            _ = traced
            return run(x)

        return forward

    def stage(self, index: int, model: nn.Module, _: Tensor) -> Commit:
        """See `Serving`: packs one model's weights.

        Raises:
            UnavailableError: some constant is not of one model.
        """
        shared, first = self._first.found.weights, self._first.found.weight_map
        new = first.constants_of(stacking.named_tensors(model), self._num_models)

        def commit() -> Undo:
            stacks = [(shared.constants[key], tensor) for key, tensor in new.items()]
            for traced in self._traced:
                stacks += traced.found.weight_map.writes(shared, new, self._num_models)
            slices = {stack.data_ptr(): (stack[index], one[0]) for stack, one in stacks}
            undo = write_in_place(list(slices.values()))()
            self._weights_changed()

            def undo_all() -> None:
                undo()
                self._weights_changed()

            return undo_all

        return commit

    def _weights_changed(self) -> None:
        for program in self._programs():
            program.weights_changed()

    def _programs(self) -> Iterator[Program]:
        for module in list(self._modules):
            yield from (part for part in module.children() if isinstance(part, Program))

    def tensors(self) -> list[Tensor]:
        """The packed weights, and the memory of all programs."""
        found = [*self._first.found.weights.constants.values()]
        for program in self._programs():
            found += program.workspace()
            found += (
                t for step in program.steps for t in (step.weight, step.bias) if t is not None
            )
        return found


def on_contiguous(module: fx.GraphModule) -> RawForward:
    """The forward of a module that was traced for contiguous inputs."""
    return lambda x: module(serial_copy.contiguous(x))
