"""What a built strategy can do with its weights later: serve other shapes, exchange a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.machine.per_process import PerProcess
from ensemble.models import stacking
from ensemble.strategies.saved_run import SavedRun

T = TypeVar("T")
Undo = Callable[[], None]
Commit = Callable[[], Undo]  # makes an exchange visible, in milliseconds; gives its inverse


@dataclass(frozen=True)
class Serving:
    """Further operations on the weights of a built strategy.

    Attributes:
        weights: what the strategy holds of the models.
        stage: `(index, model, example)` -> commit. Prepares the weights of a new model, without
            effect on calls. `commit` runs while no call runs.
        replan: as `plan`, by another trace: for models whose code depends on the batch size.
        plan: `(model, example)` -> a forward over the same weights for inputs like `example`; model
            has the architecture and is not kept. None: the forward takes inputs of any shape.
        plans_in_seconds: a plan compiles code.
        is_same_architecture: the models share one graph or stack.
        saved: `(run, model, example)` -> what a file holds of the run for inputs like `example`.
        workspace: working memory that it keeps between calls, whatever the number of models.
    """

    weights: Callable[[], Iterable[Tensor]] | None  # None: another runtime holds them
    stage: Callable[[int, nn.Module, Tensor], Commit]
    plan: Callable[[nn.Module | None, Tensor], Callable[[Tensor], Any]] | None = None
    replan: Callable[[nn.Module | None, Tensor], Callable[[Tensor], Any]] | None = None
    plans_in_seconds: bool = False
    is_same_architecture: bool = True
    saved: Callable[[Callable[[Tensor], Any], nn.Module | None, Tensor], SavedRun] | None = None
    workspace: Callable[[], Iterable[Tensor]] = tuple


class Rebuilding:
    """The serving of a strategy that has none: it builds again, so it keeps the models.

    Args:
        build: `(models, example)` -> a forward.
        models: N.
        run: the forward for `example`.
    """

    def __init__(
        self,
        build: Callable[[Sequence[nn.Module], Tensor], Callable[[Tensor], Any]],
        models: Sequence[nn.Module],
        run: Callable[[Tensor], Any],
        example: Tensor,
    ) -> None:
        self._build, self._models = build, list(models)
        self.first = _Exchangeable(run, example)
        self._all = LiveSet[_Exchangeable]()
        self._all.add(self.first)
        self.serving = Serving(None, self._stage, self._plan, plans_in_seconds=True)

    def _plan(self, _: nn.Module | None, x: Tensor) -> Callable[[Tensor], Any]:
        found = _Exchangeable(self._build(self._models, x), x.clone())
        self._all.add(found)
        return found

    def _stage(self, index: int, model: nn.Module, _: Tensor) -> Commit:
        models = [*self._models[:index], model, *self._models[index + 1 :]]
        staged = [(each, self._build(models, each.example)) for each in self._all.alive()]

        def commit() -> Undo:
            known = {id(each) for each, _ in staged}
            late = [each for each in self._all.alive() if id(each) not in known]
            # Calls have planned these meanwhile; none can now.
            runs = [*staged, *((each, self._build(models, each.example)) for each in late)]
            before, old = [(each, each.run) for each, _ in runs], self._models
            self._set(runs, models)
            return lambda: self._set(before, old)

        return commit

    def _set(
        self,
        runs: Sequence[tuple[_Exchangeable, Callable[[Tensor], Any]]],
        models: list[nn.Module],
    ) -> None:
        self._models = models
        for each, run in runs:
            each.run = run


class _Exchangeable:
    """A forward that another may take the place of, and the example that it was built with."""

    def __init__(self, run: Callable[[Tensor], Any], example: Tensor) -> None:
        self.run, self.example = run, example

    def __call__(self, x: Tensor) -> Any:
        return self.run(x)


class LiveSet(Generic[T]):
    """Objects that somebody else holds. Threads may add and list at once."""

    def __init__(self) -> None:
        self._objects, self._lock = WeakSet[T](), PerProcess(threading.Lock)

    def add(self, one: T) -> None:
        with self._lock():
            self._objects.add(one)

    def alive(self) -> list[T]:
        with self._lock():
            return list(self._objects)


def exchange_entry(entries: list[T], index: int, new: T) -> Commit:
    """Commit an exchange in a list that calls read."""

    def commit() -> Undo:
        old = entries[index]
        entries[index] = new
        return lambda: entries.__setitem__(index, old)

    return commit


def write_in_place(pairs: Sequence[tuple[Tensor, Tensor]]) -> Commit:
    """Commit by writing values into tensors whose addresses calls hold: (target, source)."""

    def commit() -> Undo:
        old = [(target, target.clone()) for target, _ in pairs]
        try:
            _copy(pairs)
        except BaseException:  # such as Ctrl-C: no call may see a part
            _copy(old)
            raise
        return lambda: _copy(old)

    return commit


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


def exchange_tensors(model: nn.Module, new: nn.Module) -> Commit:
    """Commit by writing the tensors of a new model into those of the old one.

    Raises:
        UnavailableError: their tensors differ in names or shapes.
    """
    old, given = stacking.named_tensors(model), stacking.named_tensors(new)
    shapes = [{name: t.shape for name, t in each.items()} for each in (old, given)]
    if shapes[0] != shapes[1]:
        raise UnavailableError(
            "this model is transformed differently from the one that it replaces; build another"
            " forward"
        )
    return write_in_place([(old[name], given[name]) for name in old])


def tensors_of(models: Iterable[Any]) -> list[Tensor]:
    """Every parameter and buffer of those that are modules."""
    return [
        tensor
        for model in models
        if isinstance(model, nn.Module)
        for tensor in stacking.named_tensors(model).values()
    ]


def weight_bytes(servings: Sequence[Serving]) -> int | None:
    """Memory of the weights; None where another runtime holds some."""
    found = [one.weights for one in servings]
    return None if None in found else bytes_of(t for each in found if each for t in each())


def held_bytes(servings: Sequence[Serving]) -> int | None:
    """Memory of weights and workspace; None where another runtime holds some."""
    weights = weight_bytes(servings)
    workspace = (tensor for one in servings for tensor in one.workspace())
    return None if weights is None else weights + bytes_of(workspace)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors; memory that they share counts once."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    opaque = sum(tensor.nbytes for tensor in distinct if tensor.layout != torch.strided)
    found, end = opaque, dict[torch.device, int]()  # oneDNN's layout has no address
    spans = [_span(tensor) for tensor in distinct if tensor.layout == torch.strided]
    for device, first, last in sorted(spans, key=lambda span: span[1]):
        reached = max(first, end.get(device, 0))
        found += max(0, last - reached)
        end[device] = max(reached, last)
    return found


def _span(tensor: Tensor) -> tuple[torch.device, int, int]:
    """The addresses that a tensor lies between."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return tensor.device, first, first
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) + 1
    return tensor.device, first, first + last * tensor.element_size()
