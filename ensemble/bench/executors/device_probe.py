"""What a worker finds on an accelerator before rows are measured: its limits, the first forward.

The process that starts workers on an accelerator never uses it: its models and images are on the
CPU, and a worker of its own, which ends before the others measure, answers what a report needs. So
the accelerator may be in exclusive-process mode, and holds nothing but what a row needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from ensemble.bench import roofline, workload
from ensemble.bench.case import Case
from ensemble.bench.config import Config, ModelOptions, config_of
from ensemble.bench.environment import Environment
from ensemble.bench.executors.fresh_process import StartError, Worker, WorkerError, jobs
from ensemble.bench.first_forward import FirstForward
from ensemble.bench.result_file import environment_of
from ensemble.bench.roofline import Limits
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, first_line


@dataclass(frozen=True)
class Probe:
    """What the worker found."""

    environment: Environment
    first_forward: FirstForward
    limits: roofline.Measured  # empty without --roofline


@dataclass(frozen=True, kw_only=True)
class ProbedWorkload(Workload):
    """Models and images on the CPU, for workers that measure on an accelerator."""

    config: Config

    @cached_property
    def _probe(self) -> Probe:
        return probe(self.config, self)

    def first_forward(self, options: ModelOptions) -> FirstForward:
        return self._probe.first_forward

    def limits_of(self, cases: Sequence[Case]) -> roofline.Measured:
        return self._probe.limits

    def describe(self, config: Config, *, first_forward_s: float) -> Environment:
        return replace(
            self._probe.environment,
            argv=tuple(sys.argv),
            weights=self.weights,
            first_forward_s=first_forward_s,
        )


def load(config: Config, *, say: Callable[[str], None]) -> Workload:
    """The workload of a configuration: see `workload.load`.

    Raises:
        InputError: see there.
    """
    found = workload.load(config, say=say)
    if not workload.is_remote(config, found.device):
        return found
    own = {option.name: getattr(found, option.name) for option in fields(found)}
    return ProbedWorkload(**own, config=config.for_architecture(found.image_size))


def probe(config: Config, found: Workload) -> Probe:
    """Ask a worker of its own about the device of the workload.

    Raises:
        InputError: the device cannot be used, or the architecture does not run on it.
    """
    count = max(1, len(config.models.model_path or ()))  # those whose predictions are printed
    few, asked = replace(found, models=found.models[:count]), {"probe": True}
    try:
        with jobs(config, few) as job, Worker(job, ()) as worker:
            worker.wait()
            message = next(worker.answers(asked))
    except (StartError, WorkerError) as error:
        raise InputError(f"{found.device} cannot be used: {error}", argument="device") from error
    if "error" in message:
        raise InputError(message["error"], argument=message["argument"])
    return _probe_of(message)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The message of a worker that was asked for a probe: its fields as plain values, or the error
    and the argument at fault."""
    config, device = config_of(job["config"]), job["device"]
    try:
        shared = workload.load_shared(job["shared"], config, device=device)
        seen = shared.first_forward(config.models)
        limited = config.plan() if config.measure.roofline else []
        return _plain(
            Probe(
                shared.describe(config, first_forward_s=seen.seconds),
                seen,
                shared.limits_of(limited),
            )
        )
    except InputError as error:
        return {"error": error.message, "argument": error.argument}
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"error": f"{device} cannot be used: {reason}", "argument": "device"}


def _plain(found: Probe) -> dict[str, Any]:
    return {
        "environment": asdict(found.environment),
        "seconds": found.first_forward.seconds,
        "logits": [
            # of other outputs only the shape is printed
            {"shape": list(one.shape), "values": one.tolist() if one.dim() == 1 else None}
            for one in found.first_forward.logits
        ],
        "limits": {
            dtype: [asdict(limits) if limits else None, notes]
            for dtype, (limits, notes) in found.limits.items()
        },
    }


def _probe_of(message: dict[str, Any]) -> Probe:
    logits = tuple(
        torch.empty(one["shape"], device="meta", dtype=torch.float32)
        if one["values"] is None
        else torch.tensor(one["values"], device="cpu", dtype=torch.float32)
        for one in message["logits"]
    )
    limits = {
        dtype: (Limits(**values) if values else None, tuple(notes))
        for dtype, (values, notes) in message["limits"].items()
    }
    environment = environment_of(message["environment"])
    return Probe(environment, FirstForward(message["seconds"], logits), limits)
