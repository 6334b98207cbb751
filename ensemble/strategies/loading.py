"""The forward that a file holds: its plans, and further ones for other batch sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.artifacts import tensor_file
from ensemble.artifacts.graph_format import decode
from ensemble.artifacts.version import check_version
from ensemble.compiler.runtime import serial_copy
from ensemble.compiler.runtime.instructions import Instructions
from ensemble.compiler.runtime.packed_weight import PackedWeight
from ensemble.errors import InputError, UnavailableError, first_line
from ensemble.machine.per_process import use_one_thread_after_fork
from ensemble.strategies.build_result import BuildResult, Choice, PerModel, RawForward
from ensemble.strategies.contexts import execution_context
from ensemble.strategies.forward import Forward
from ensemble.strategies.saved_run import ALL, CONCURRENT, EACH
from ensemble.strategies.serving import LiveSet, Serving, Undo
from ensemble.strategies.shape_plans import Route, Shape


def load(path: str | os.PathLike[str]) -> Forward:
    """The forward that `save` wrote, with equal results to the last bit.

    Weights are mapped into memory: processes that load one file share them, and the file must not
    be overwritten in place meanwhile. It takes the shapes that were planned when it was saved, and
    other batch sizes that were compared then, up to 32; its models cannot be replaced. Load files
    that you trust: as of any weights, they decide what is computed.

    Raises:
        InputError: the file is missing, damaged or of another kind; or it was saved by another
            version of this package or torch, or on a CPU with other vector instructions.
    """
    use_one_thread_after_fork()
    found = tensor_file.read(path)
    try:
        check_version(found.content["version"], str(path))
        with execution_context(torch.device("cpu")):
            return _loaded(found)
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        message = (
            f"{path}: expected a file that ensemble.save wrote, but its content is not: {reason}"
        )
        raise InputError(message) from error


def _loaded(found: tensor_file.Content) -> Forward:
    content, tensors = found.content, found.tensors
    threads, num_models = torch.get_num_threads(), content["num_models"]
    shape, report = tuple(content["shape"]), content["report"]
    example = torch.empty(
        shape, dtype=getattr(torch, content["dtype"].removeprefix("torch.")), device="cpu"
    )
    routes = dict[Shape, Route]()
    for plan in content["plans"]:
        run = decode_plan(plan, tensors, threads, num_models)
        routes[tuple(plan["shape"])] = Route(run, plan["batch_size"])
    loaded = _Loaded(routes, num_models, tensors, frozenset(content["batch_sizes"]))
    choice = Choice(report["strategy"], "", 0.0, report["times_s"], report["errors"])
    built = BuildResult(
        routes[shape].run,
        note="; ".join(report["notes"]),
        choice=choice,
        serving=Serving(loaded.weights, _no_exchange, loaded.plan, workspace=loaded.workspace),
        kernels=report["kernels"],
    )
    forward = Forward(
        built,
        content["strategy"],
        example,
        num_models=num_models,
        model=None,
        max_batch=content["max_batch"],
        is_verified=False,
    )
    forward.plans.add(routes)
    return forward


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A saved run: `graph(*constants, x)` of all models, or of each."""

    graph: Instructions
    mode: str
    is_channels_last: bool
    constants: Sequence[Sequence[Any]]

    def __call__(self, x: Tensor) -> Any:
        x = serial_copy.contiguous(x)
        if self.is_channels_last:
            x = serial_copy.contiguous(x.movedim(-3, -1)).movedim(-1, -3)
        if self.mode == ALL:
            return self.graph(*self.constants[0], x)
        return PerModel(
            [
                self.graph(*constants, x[index] if x.dim() == 5 else x)
                for index, constants in enumerate(self.constants)
            ]
        )


class _Loaded:
    """The runs of a file, and those for other batch sizes that derive from them."""

    def __init__(
        self,
        routes: Mapping[Shape, Route],
        num_models: int,
        tensors: Sequence[Tensor],
        batch_sizes: frozenset[int],
    ) -> None:
        """batch_sizes: those for which `Instructions.with_batch_size` was found to be right."""
        self._routes, self._num_models, self._tensors = dict(routes), num_models, tensors
        self._batch_sizes = batch_sizes
        self._runs = LiveSet[RawForward]()
        for route in routes.values():
            self._runs.add(route.run)

    def plan(self, _: nn.Module | None, x: Tensor) -> RawForward:
        """A run for inputs like x.

        Raises:
            UnavailableError: the file has none, and none can be derived.
        """
        alike = [
            (shape, route.run)
            for shape, route in self._routes.items()
            if shape[-3:] == x.shape[-3:]
        ]
        for shape, run in alike:
            graph = run.graph if isinstance(run, LoadedRun) else None
            is_of_each = not isinstance(run, LoadedRun) or run.mode != ALL
            if is_of_each and shape[-4] == x.shape[-4]:
                return run
            if graph is None or x.shape[-4] not in self._batch_sizes:
                continue
            resized = graph.with_batch_size(self._num_models, shape[-4], x.shape[-4])
            if resized is not None:
                assert isinstance(run, LoadedRun)
                planned = replace(run, graph=resized)
                self._runs.add(planned)
                return planned
        raise UnavailableError(
            f"the saved forward has no plan for inputs of shape {tuple(x.shape)}: call"
            " forward.prepare before it is saved, or build another forward"
        )

    def weights(self) -> list[Tensor]:
        return [*self._tensors]

    def workspace(self) -> list[Tensor]:
        programs = (
            program
            for run in self._runs.alive()
            if isinstance(run, LoadedRun)
            for program in run.graph.programs()
        )
        return [memory for program in programs for memory in program.workspace()]


def _no_exchange(index: int, model: nn.Module, example: Tensor) -> Callable[[], Undo]:
    raise UnavailableError("models of a loaded forward cannot be replaced; build another forward")


def decode_plan(
    plan: Mapping[str, Any], tensors: Sequence[Tensor], threads: int, num_models: int
) -> RawForward:
    constants = [[_decode_constant(each, tensors) for each in model] for model in plan["constants"]]
    graph = decode(plan["graph"], tensors, threads=threads)
    of_models = 1 if plan["mode"] == ALL else num_models
    if plan["mode"] not in (ALL, EACH, CONCURRENT) or len(constants) != of_models:
        raise ValueError(f"a plan is not of {num_models} models")
    if any(program.num_models != num_models for program in graph.programs()):
        raise ValueError(f"a program is not of {num_models} models")
    run = LoadedRun(graph, plan["mode"], plan["is_channels_last"], constants)
    if plan["mode"] != CONCURRENT:
        return run
    from ensemble.strategies.concurrent import concurrent_forward  # which imports torch.compile

    example = torch.empty(plan["shape"], dtype=torch.float32, device="cpu")
    return concurrent_forward([partial(graph, *one) for one in constants], example)


def _decode_constant(data: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
    if "tensor" in data:
        return tensors[data["tensor"]]
    if "packed" in data:
        return PackedWeight(tensors[data["packed"]], tuple(data["arguments"])).pack()
    return data["number"]
