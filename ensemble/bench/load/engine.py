"""The forwards of a strategy for every batch size: they compute batches, and check each answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.load.batching import ALONE, Batch, Way
from ensemble.machine.devices import synchronize
from ensemble.strategies.agreement import TOLERANCES

CLASSES = 32  # of each answer that are compared under load, spread over all classes

Key = tuple[str, int]  # mode, size


@dataclass(frozen=True)
class Forwards:
    """The forwards of one way, one for each lane that it may compute, and where images are put."""

    started: tuple[BuiltStrategy, ...]
    input: Tensor
    slots: tuple[tuple[Tensor, ...], ...]  # views of `input`, of each lane


class Engine:
    """Computes batches and compares every answer with what the reference said of its image."""

    def __init__(
        self,
        forwards: dict[Key, Forwards],
        ways: Sequence[Way],
        expected: Tensor,
        images: Tensor,
        max_rel_error: float | None,
    ) -> None:
        self._forwards, self._images = forwards, images.unbind()
        self.ways, self.max_rel_error = tuple(ways), max_rel_error
        self.build_s = sum(started.build_s for way in forwards.values() for started in way.started)
        self.first_call_s = sum(
            started.first_call_s for way in forwards.values() for started in way.started
        )
        notes = (note for way in forwards.values() for note in way.started[0].notes)
        self.notes = tuple(dict.fromkeys(notes))
        step = -(-expected.shape[2] // CLASSES)
        self._step, self._expected = step, expected[:, :, ::step].float().cpu().numpy()
        largest = expected.abs().amax((1, 2)).float().cpu().numpy()
        self._limits = TOLERANCES[images.dtype] * largest

    def compute(self, batch: Batch) -> tuple[int, float]:
        """How many requests of the batch were answered wrongly, and the seconds of its forward."""
        forwards = self._forwards[batch.way.mode, batch.way.size]
        for slots, requests in zip(forwards.slots, batch.requests, strict=True):
            for slot, request in zip(slots, requests, strict=False):
                slot.copy_(self._images[request.image])
        lane = batch.lanes[0] if len(forwards.started) > 1 else 0
        begin = time.perf_counter()
        logits = forwards.started[lane].forward(forwards.input)
        synchronize(logits.device)
        seconds = time.perf_counter() - begin
        return self._wrong(batch, logits), seconds

    @property
    def images(self) -> int:
        """How many images there are to ask for."""
        return len(self._images)

    @property
    def device(self) -> torch.device:
        return self._images[0].device

    def told_apart(self) -> bool:
        """Do any two answers of a model differ by more than twice what is let pass as right?"""
        for logits, limit in zip(self._expected, self._limits, strict=True):
            apart = np.abs(logits[:, None] - logits[None]).max(2)
            np.fill_diagonal(apart, np.inf)
            if apart.min() <= 2 * limit:
                return False
        return True

    def _wrong(self, batch: Batch, logits: Tensor) -> int:
        found = logits[:, :, :: self._step].float().cpu().numpy()
        if len(found) == len(self._expected) and batch.way.mode == ALONE:  # all models, one lane
            (requests,) = batch.requests
            images = [request.image for request in requests]
            errors = np.abs(found[:, : len(images)] - self._expected[:, images]).max(2)
            return int((~(errors <= self._limits[:, None]).all(0)).sum())
        wrong = 0
        for answers, lane, requests in zip(found, batch.lanes, batch.requests, strict=True):
            if requests:
                images = [request.image for request in requests]
                errors = np.abs(answers[: len(images)] - self._expected[lane, images]).max(1)
                wrong += int((~(errors <= self._limits[lane])).sum())
        return wrong
