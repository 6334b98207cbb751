"""The inference engine: runs a batch by the forward of its plan, and checks every answer.

Requests have their images in host memory, and answers are there: on CUDA a batch includes both
copies.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.load.batching import SINGLE_TENANT, Batch, BatchPlan

CHECKED_CLASSES = 32  # logits compared per answer under load, evenly spaced over all values

PlanKey = tuple[str, int]  # mode, batch size


@dataclass(frozen=True)
class BuiltPlan:
    """The forwards of a batch plan, one per tenant or one for all, and their input buffer."""

    forwards: tuple[BuiltStrategy, ...]
    input: Tensor
    slots: tuple[tuple[Tensor, ...], ...]  # views of `input`: per tenant, per image


class Engine:
    """Runs batches and compares every answer with the reference logits of its image."""

    def __init__(
        self,
        built_plans: dict[PlanKey, BuiltPlan],
        plans: Sequence[BatchPlan],
        expected: Tensor,
        images: Tensor,  # (count, 3, px, px) in host memory, on CUDA pinned
        *,
        tolerance: float,
        max_rel_error: float | None,
        held_bytes: int | None,
        weight_bytes: int | None,
    ) -> None:
        self._built_plans, self._images = built_plans, images.unbind()
        self.plans, self.max_rel_error = tuple(plans), max_rel_error
        self.held_bytes, self.weight_bytes = held_bytes, weight_bytes
        self.device = next(iter(built_plans.values())).input.device
        forwards = [forward for built in built_plans.values() for forward in built.forwards]
        self.build_s = sum(forward.build_s for forward in forwards)
        self.first_call_s = sum(forward.first_call_s for forward in forwards)
        notes = (note for built in built_plans.values() for note in built.forwards[0].notes)
        self.notes = tuple(dict.fromkeys(notes))
        values = _by_image(expected)
        step = -(-values.shape[2] // CHECKED_CLASSES)
        self._step, self._expected = step, values[:, :, ::step].cpu().numpy()
        largest = values.abs().amax((1, 2)).cpu().numpy()
        self._tolerances = tolerance * largest

    def execute(self, batch: Batch) -> tuple[int, float]:
        """Run a batch: the number of its requests with a wrong answer, and the time of the forward
        until its logits are on the host."""
        built = self._built_plans[batch.plan.mode, batch.plan.batch_size]
        for slots, requests in zip(built.slots, batch.requests, strict=True):
            for slot, request in zip(slots, requests, strict=False):
                slot.copy_(self._images[request.image], non_blocking=True)
        index = batch.tenants[0] if len(built.forwards) > 1 else 0
        built.forwards[index].ready()
        begin = time.perf_counter()
        logits = built.forwards[index].forward(built.input).cpu()
        seconds = time.perf_counter() - begin
        return self._count_wrong(batch, logits), seconds

    @property
    def num_images(self) -> int:
        """The number of different images."""
        return len(self._images)

    def distinguishes_images(self) -> bool:
        """Do the answers of every model to any two images differ by more than twice the tolerance?

        Otherwise an answer to the wrong image would pass the check.
        """
        for logits, tolerance in zip(self._expected, self._tolerances, strict=True):
            distances = np.abs(logits[:, None] - logits[None]).max(2)
            np.fill_diagonal(distances, np.inf)
            if distances.min() <= 2 * tolerance:
                return False
        return True

    def _count_wrong(self, batch: Batch, logits: Tensor) -> int:
        checked = _by_image(logits)[:, :, :: self._step].cpu().numpy()
        is_ensemble = len(checked) == len(self._expected) and batch.plan.mode == SINGLE_TENANT
        if is_ensemble:  # every model answers every request
            (requests,) = batch.requests
            images = [request.image for request in requests]
            errors = np.abs(checked[:, : len(images)] - self._expected[:, images]).max(2)
            return int((~(errors <= self._tolerances[:, None]).all(0)).sum())
        wrong = 0
        for answers, tenant, requests in zip(checked, batch.tenants, batch.requests, strict=True):
            if requests:
                images = [request.image for request in requests]
                errors = np.abs(answers[: len(images)] - self._expected[tenant, images]).max(1)
                wrong += int((~(errors <= self._tolerances[tenant])).sum())
        return wrong


def _by_image(outputs: Tensor) -> Tensor:
    """Outputs `(N, images, ...)` as float32 `(N, images, values)`."""
    return outputs.float().reshape(*outputs.shape[:2], -1)
