"""What one rank holds, and the steps that it takes in lockstep with all others.

Each step is a method that all ranks call at the same time with the same arguments; what only rank 0
has comes as a keyword. What fails on one rank is told to all at the end of a step, and fails a row;
a rank that is gone is a RankError, from any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ensemble.bench.build import BuiltStrategy, build, release_compiled
from ensemble.bench.case import REFERENCE
from ensemble.bench.config import Config
from ensemble.bench.executors.ranks.exchange import Exchange
from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.outcomes import Division, Outcome, failed
from ensemble.bench.executors.ranks.sharding import blocks
from ensemble.bench.failures import explain, optional
from ensemble.bench.setup import in_float64
from ensemble.errors import InputError, UnavailableError
from ensemble.machine import memory
from ensemble.machine.devices import synchronize
from ensemble.models import sources
from ensemble.strategies.reduction import with_reduction

ROUNDS = 5  # of telling apart what a call consists of


@dataclass
class Held:
    """A strategy over this rank's models, and what a call of it moves."""

    name: str
    started: BuiltStrategy
    exchange: Exchange
    failed: str = ""  # why a call of it has failed here
    forward_s: list[float] | None = None  # what each forward takes, while that is asked


class Member:
    """One rank."""

    def __init__(self, config: Config, group: Group, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.models: list[nn.Module] = []  # always this list: who shows it shows what is held
        self.weights = ""
        self._num_models = 0  # of which `models` are this rank's share
        self._all: Sequence[nn.Module] = ()  # on rank 0, what one rank would hold
        self._shape = torch.Size()
        self._example = torch.empty(0, device="cpu", dtype=torch.float32)
        self._held: dict[str, Held] = {}

    def load(self, num_models: int, *, say: Callable[[str], None]) -> None:
        """Hold this rank's share of N models, and no others.

        Raises:
            InputError: fewer models than ranks, or what `sources.load` finds wrong.
        """
        block = blocks(num_models, self.group.ranks)[self.group.rank]
        if num_models != self._num_models:
            self._held.clear()
            self.models.clear()
            self._all, self._num_models = (), 0
            self.models[:], self.weights = self._read(num_models, block, say)
            self._num_models = num_models

    def open(self, num_models: int, shape: tuple[int, ...]) -> list[Outcome]:
        """Turn to a cell of the grid: N models, and inputs of this shape."""
        self._held.clear()
        self._shape = torch.Size(shape)
        try:
            self.load(num_models, say=lambda _: None)
            outcome = Outcome()
        except InputError as error:
            outcome = Outcome("failed", str(error))
        return self.group.collect(outcome)

    def see(self, *, image: Tensor | None = None) -> list[Tensor]:
        """The logits of one image by each of the models, `(classes,)` each, in their order."""
        x = self._exchange(torch.float32).spread(image)
        with torch.inference_mode():
            seen = [model(x)[0].cpu() for model in self.models]
        return [logits for each in self.group.collect(seen) for logits in each]

    def build(self, name: str, dtype: str, *, example: Tensor | None = None) -> list[Outcome]:
        """Start a strategy over each rank's own models; it is held where all could start it.

        What chooses at build chooses on each rank, all at the same time as they will run; where not
        all choose alike, rank 0's choice is built by those that chose another.
        """
        for other in [key for key in self._held if key != REFERENCE]:
            del self._held[other]
        self._example = self._exchange(torch.float32).spread(example).clone()
        key, kind = key_of(name, dtype), getattr(torch, dtype)
        every = self.group.collect(self._begin(key, name, kind))
        picked = [outcome.choice.name if outcome.choice else None for outcome in every]
        if picked[0] is not None and not failed(every) and len(set(picked)) > 1:
            differs = picked[self.group.rank] != picked[0]
            again = self._begin(key, picked[0], kind) if differs else every[self.group.rank]
            every = self.group.collect(again)
        if failed(every):
            self._held.pop(key, None)
        return every

    def _begin(self, key: str, name: str, dtype: torch.dtype) -> Outcome:
        self._held.pop(key, None)
        release_compiled()
        try:
            seconds = self.config.measure.tune_seconds
            started = build(name, self.models, self._example, dtype, tune_seconds=seconds)
        except UnavailableError as error:
            return Outcome("unavailable", str(error))
        except Exception as error:
            return Outcome("failed", explain(error, name, self.models, self._example, dtype))
        picked = started.choice.name if started.choice else name
        self._held[key] = Held(picked, started, self._exchange(dtype))
        return Outcome(
            build_s=started.build_s,
            first_call_s=started.first_call_s,
            peak_memory_bytes=started.peak_memory_bytes,
            notes=started.notes,
            choice=started.choice,
        )

    def call(self, key: str, reduce: str, *, x: Tensor | None = None) -> Tensor | None:
        """One call over all ranks: what is served of x, on rank 0. All have met before."""
        held = self._held[key]
        with torch.inference_mode():
            part = held.exchange.spread(x)
            return held.exchange.served(self._forward(held, part), reduce)

    def float64_logits(self, *, example: Tensor | None = None) -> list[Tensor | str]:
        """Each rank's logits in float64, or why it has none."""
        x = self._exchange(torch.float32).spread(example)
        logits, notes = optional("error to float64", partial(in_float64, self.models, x.clone()))
        return self.group.collect(notes[0] if logits is None else logits.cpu())

    def divide(self, key: str, *, x: Tensor | None = None) -> list[Division]:
        """Tell apart what a call consists of, on each rank: see `measurement.RankTimes`."""
        held, everything, notes = self._held[key], None, tuple[str, ...]()
        whole, alone, one_rank = list[float](), list[float](), list[float]()
        if x is not None and not held.failed:
            make = partial(self._on_one_rank, held, x)
            everything, notes = optional("speedup over one rank", make)
        held.forward_s = forwards = list[float]()
        for _ in range(1 + ROUNDS):  # the first is not counted
            held.forward_s = forwards
            whole.append(self._timed(partial(self.call, key, self.config.models.reduce, x=x)))
            held.forward_s = None
            forward = partial(self._forward, held, held.started.example)
            for rank in range(self.group.ranks):
                seconds = self._timed(forward if rank == self.group.rank else None)
                alone += [seconds] if rank == self.group.rank else []
            seconds = self._timed(everything.call if everything else None)
            one_rank += [seconds] if everything else []
        return self.group.collect(
            Division(
                whole_s=tuple(whole[1:]),
                forward_s=tuple(forwards[1:]),
                alone_s=tuple(alone[1:]),
                one_rank_s=tuple(one_rank[1:]),
                notes=notes,
                failed=held.failed,
            )
        )

    def _timed(self, function: Callable[[], object] | None) -> float:
        """Seconds of a function, once all ranks have met; one without waits at the next meeting."""
        self.group.meet()
        begin = time.perf_counter()
        if function is not None:
            with torch.inference_mode():
                function()
            synchronize(self.device)
        return time.perf_counter() - begin

    def _forward(self, held: Held, x: Tensor) -> Tensor:
        """This rank's logits. After a failure they are no numbers, so that the other ranks do not
        wait for them in vain: the row fails, and says why."""
        begin = time.perf_counter()
        logits = None
        if not held.failed:
            try:
                logits = held.started.forward(x)
            except Exception as error:
                example = held.started.example
                held.failed = explain(error, held.name, self.models, example, example.dtype)
        if held.forward_s is not None:
            synchronize(self.device)
            held.forward_s.append(time.perf_counter() - begin)
        return torch.full_like(held.started.logits, torch.nan) if logits is None else logits

    def _on_one_rank(self, held: Held, x: Tensor) -> BuiltStrategy:
        """The strategy over all N models on this rank alone, where they fit.

        Raises:
            UnavailableError: it may need more memory than is free, by what its own share took.
        """
        peak, free = held.started.peak_memory_bytes, memory.available_bytes(self.device)
        needed = (peak or 0) * self._num_models / len(self.models)
        if free is not None and needed > free:
            message = f"it may take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise UnavailableError(message)
        everything = range(self._num_models)
        self._all = self._all or self._read(self._num_models, everything, lambda _: None)[0]
        alone = build(held.name, self._all, x.float(), x.dtype)
        return replace(alone, serve=with_reduction(alone.forward, self.config.models.reduce))

    def _exchange(self, dtype: torch.dtype) -> Exchange:
        shards = blocks(self._num_models, self.group.ranks)
        return Exchange(self.group, shards, self._shape, dtype)

    def _read(
        self, num_models: int, block: range, say: Callable[[str], None]
    ) -> tuple[Sequence[nn.Module], str]:
        return sources.load(
            self.config.models.model_path,
            arch=self.config.models.arch,
            num_models=num_models,
            device=self.device,
            seed=self.config.run.seed,
            say=say,
            block=block,
        )


def key_of(name: str, dtype: str) -> str:
    """What a strategy is held under; the reference under its own name."""
    return name if name == REFERENCE and dtype == "float32" else f"{name} {dtype}"
