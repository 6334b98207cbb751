"""`lowered_vmap` after its build: programs for further shapes, and the exchange of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ensemble.compiler.pipeline import CompiledForward, compile_for_shape
from ensemble.compiler.runtime import serial_copy
from ensemble.compiler.runtime.instructions import Instructions, instructions_of
from ensemble.models import stacking
from ensemble.strategies.build_result import RawForward
from ensemble.strategies.saved_run import ALL, SavedRun
from ensemble.strategies.serving import Commit, LiveSet, Undo, write_in_place

if TYPE_CHECKING:
    from ensemble.compiler.runtime.program import Program


@dataclass(frozen=True, eq=False)
class Traced:
    """A compiled forward, and the shape of its input, `(..., B, C, H, W)`."""

    found: CompiledForward
    graph: Instructions
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CompiledRun:
    """A forward for inputs of one shape; `traced` is what it derives from, and keeps alive."""

    graph: Instructions
    traced: Traced | None = None

    def __call__(self, x: Tensor) -> Any:
        return self.graph(serial_copy.contiguous(x))


class CompiledModels:
    """The compiled forwards of N models over the same packed weights.

    One for another batch size has the same steps, of more or fewer images: it is planned in
    milliseconds. One for another size of images is traced anew. They live as long as a caller holds
    them; the first one always.
    """

    def __init__(
        self, found: CompiledForward, example: Tensor, num_models: int, threads: int
    ) -> None:
        self._num_models, self._threads = num_models, threads
        self._traced, self._runs = LiveSet[Traced](), LiveSet[CompiledRun]()
        self.run = self._added(found, example)
        assert self.run.traced is not None
        self._first = self.run.traced

    def plan(self, model: nn.Module | None, x: Tensor) -> CompiledRun:
        """A forward for inputs like x; see `Serving`.

        Raises:
            UnavailableError: see `compile_for_shape`.
        """
        for traced in self._traced.alive():
            if traced.shape[-3:] == x.shape[-3:]:
                images = traced.shape[-4], x.shape[-4]
                if graph := traced.graph.with_batch_size(self._num_models, *images):
                    run = CompiledRun(graph, traced)
                    self._runs.add(run)
                    return run
        return self.replan(model, x)

    def replan(self, model: nn.Module | None, x: Tensor) -> CompiledRun:
        """A forward for inputs like x by another trace; see `Serving`.

        Raises:
            UnavailableError: see `compile_for_shape`.
        """
        assert model is not None
        found = compile_for_shape(
            model,
            x,
            self._first.found.weights,
            num_models=self._num_models,
            threads=self._threads,
        )
        return self._added(found, x)

    def _added(self, found: CompiledForward, x: Tensor) -> CompiledRun:
        traced = Traced(found, instructions_of(found.forward), tuple(x.shape))
        run = CompiledRun(traced.graph, traced)
        self._traced.add(traced)
        self._runs.add(run)
        return run

    def stage(self, index: int, model: nn.Module, _: Tensor) -> Commit:
        """See `Serving`: packs one model's weights.

        Raises:
            UnavailableError: some constant is not of one model.
        """
        shared, first = self._first.found.weights, self._first.found.weight_map
        new = first.constants_of(stacking.named_tensors(model), self._num_models)

        def commit() -> Undo:
            stacks = [(shared.constants[key], tensor) for key, tensor in new.items()]
            for traced in self._traced.alive():
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
        for run in self._runs.alive():
            yield from run.graph.programs()

    def saved(self, run: RawForward, _: nn.Module | None, x: Tensor) -> SavedRun:
        """See `Serving`."""
        assert isinstance(run, CompiledRun)
        return SavedRun(ALL, False, run.graph, [[]])

    def weights(self) -> list[Tensor]:
        """The packed weights of all programs."""
        found = [*self._first.found.weights.constants.values()]
        for program in self._programs():
            for step in program.steps:
                found += (t for t in (step.weight, step.bias) if t is not None)
        return found

    def workspace(self) -> list[Tensor]:
        """The memory of intermediate values of all programs, of one model a core."""
        return [memory for program in self._programs() for memory in program.workspace()]
