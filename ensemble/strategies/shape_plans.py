"""Which run serves an input of which shape: the strategy's own, a plan of its shape, or a larger
plan with the batch padded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import is_close
from ensemble.errors import UnavailableError
from ensemble.machine.per_process import PerProcess
from ensemble.strategies import agreement
from ensemble.strategies.build_result import PerModel, RawForward

Shape = tuple[int, ...]
MAX_UNPREPARED = 16  # plans that calls have made, at most; the oldest is dropped


@dataclass(frozen=True)
class Route:
    """A run of `batch_size` images, of which those of the caller are the first."""

    run: RawForward
    batch_size: int


class ShapePlans:
    """The routes of a forward, by the shape of its input.

    A shape that is new is served by the first of these whose result for one model is the model's
    own: a larger prepared batch with zeros appended, a plan of exactly that shape.

    Args:
        run: of the example that the strategy was built with.
        shape: of that example.
        plan: `(model, example)` -> a run for inputs like `example`; None: `run` takes any shape.
        replan: as `plan`, where its result is not the model's.
        plans_in_seconds: planning compiles code, so that padding to the shape of the example is
            preferred.
        model: the first model, or a copy of it.
        is_verified: compare the first result of each new shape with that of `model`.
    """

    def __init__(
        self,
        run: RawForward,
        shape: Shape,
        *,
        plan: Callable[[nn.Module | None, Tensor], RawForward] | None,
        replan: Callable[[nn.Module | None, Tensor], RawForward] | None = None,
        plans_in_seconds: bool,
        model: nn.Module | None,
        is_verified: bool,
    ) -> None:
        self._run, self._plan, self._replan = run, plan, replan
        self.model, self._is_verified = model, is_verified
        own = Route(run, shape[-4])
        self._prepared: dict[Shape, Route] = {shape: own} if plans_in_seconds else {}
        self._built = {shape: own}  # in the order of their first inputs
        self._own_shape = shape
        self._lock = PerProcess(threading.RLock)

    def add(self, routes: Mapping[Shape, Route]) -> None:
        """Add prepared routes."""
        with self._lock():
            self._prepared |= routes
            self._built |= routes

    def routes(self) -> dict[Shape, Route]:
        """What serves each of `shapes`."""
        with self._lock():
            return {**self._built, **self._prepared}

    def treats_images_independently(self, x: Tensor) -> bool:
        """Is the first model's result for an image, of two in x, the same without the other?"""
        if self.model is None or not self._is_verified:
            return False
        try:
            both, one = self.model(x.clone()), self.model(x[:1].clone())
        except Exception:  # a model may need an exact number of images
            return False
        return isinstance(both, Tensor) and both.dim() > 0 and is_close(both[:1], one)

    def verified_batch_sizes(self, x: Tensor, largest: int) -> list[int]:
        """The batch sizes up to `largest` for which a plan gives the first model's own result.

        x: an image, `(1, C, H, W)`.
        """
        if not self.treats_images_independently(torch.cat([x, x.flip(-1)])):
            return []
        sizes = []
        for size in range(1, largest + 1):
            images = torch.cat([x.roll(shift, -1) for shift in range(size)])
            try:
                if self._agrees(self._planned(images), images):
                    sizes.append(size)
            except Exception:  # the model does not take so many, or has no plan for them
                continue
        return sizes

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that are served without planning."""
        with self._lock():
            return tuple({**self._built, **self._prepared})

    def __call__(self, x: Tensor) -> Any:
        """The outputs of the strategy for x: stacked `(N, B, ...)`, or `PerModel`."""
        route = self._built.get(tuple(x.shape)) or self._route(x)
        return _outputs(route, x)

    def prepare(self, example: Tensor) -> None:
        """Plan for inputs like `example`, and keep the plan."""
        shape = tuple(example.shape)
        with self._lock():
            if shape in self._prepared:
                return
            route = self._built.get(shape)
            if route is None or route.batch_size != example.shape[-4]:
                route = self._verified(example, None)
            self._prepared[shape] = self._built[shape] = route

    def _route(self, x: Tensor) -> Route:
        """The route of a shape that has none yet."""
        with self._lock():
            if route := self._built.get(tuple(x.shape)):
                return route
            route = self._verified(x, self._larger(tuple(x.shape)))
            self._built[tuple(x.shape)] = route
            kept = {self._own_shape, *self._prepared}
            made = [shape for shape in self._built if shape not in kept]
            if self._plan is not None:
                for shape in made[:-MAX_UNPREPARED]:
                    del self._built[shape]
            return route

    def _larger(self, shape: Shape) -> Route | None:
        """The smallest prepared batch that holds one of this shape."""
        alike = [
            route
            for other, route in self._prepared.items()
            if (other[:-4], other[-3:]) == (shape[:-4], shape[-3:]) and other[-4] > shape[-4]
        ]
        return min(alike, key=lambda route: route.batch_size, default=None)

    def _planned(self, x: Tensor) -> Route:
        return Route(self._plan(self.model, x) if self._plan else self._run, x.shape[-4])

    def _verified(self, x: Tensor, larger: Route | None) -> Route:
        """The first route whose result for the first model is the model's own: the larger batch,
        with padding; a plan; a plan by another trace.

        Raises:
            UnavailableError: there is none.
            Exception: the model's own error for x.
        """
        if not self._is_verified or self.model is None:
            return self._planned(x)
        x = agreement.informative(x).contiguous()
        if larger is not None and all(self._agrees(larger, each) for each in _beside_zeros(x)):
            return larger
        route = self._planned(x)
        if self._agrees(route, x):
            return route
        if self._replan is not None:
            route = Route(self._replan(self.model, x), x.shape[-4])
            if self._agrees(route, x):
                return route
        raise UnavailableError(
            f"inputs of shape {tuple(x.shape)} give another result than the models do; build"
            " another forward with an example of that shape"
        )

    def _agrees(self, route: Route, x: Tensor) -> bool:
        """Is a route's result for the first model the model's own?

        Raises:
            Exception: the model's own error for x.
        """
        assert self.model is not None
        expected = self.model((x[0] if x.dim() == 5 else x).clone())
        try:
            found = _outputs(route, x)
        except _NotPerImageError:
            return False
        return is_close(found.outputs[0] if isinstance(found, PerModel) else found[0], expected)


class _NotPerImageError(Exception):
    """Outputs that have no batch dimension, of which those of padding could be cut."""


def _beside_zeros(x: Tensor) -> list[Tensor]:
    """x, and where it is of numbers, noise that is above and noise that is below the zeros of
    padding: a result that depends on the largest image, or the smallest, shows in one of them."""
    if not x.is_floating_point():
        return [x]
    generator = torch.Generator(x.device).manual_seed(0)  # not the global generator
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) + 0.1
    return [x, noise, -noise]


def _outputs(route: Route, x: Tensor) -> Any:
    """The outputs for x: `(B, C, H, W)`, or `(N, B, C, H, W)`, with zero images appended."""
    batch_size = x.shape[-4]
    if route.batch_size == batch_size:
        return route.run(x)
    shape = [*x.shape]
    shape[-4] = route.batch_size - batch_size
    outputs = route.run(torch.cat([x, x.new_zeros(shape)], dim=-4))
    if isinstance(outputs, PerModel):
        return PerModel(
            [_first(output, route.batch_size, batch_size) for output in outputs.outputs]
        )
    return torch.stack([_first(output, route.batch_size, batch_size) for output in outputs])


def _first(output: Any, padded: int, batch_size: int) -> Any:
    """The results of the first images, of one model."""
    if not isinstance(output, Tensor) or not output.dim() or len(output) != padded:
        raise _NotPerImageError
    return output[:batch_size]
