"""The state of one rank, and the steps that it runs in lockstep with all others.

Each step is a method that all ranks call at the same time with the same arguments; rank 0 also
passes keyword arguments. A failure on one rank is gathered by all at the end of a step and fails
the row; a lost rank is a RankError, from any step.
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
from ensemble.bench.executors.ranks.rank_reports import CallProfile, RankReport, any_failed
from ensemble.bench.executors.ranks.sharding import shard_ranges
from ensemble.bench.failures import explain, optional
from ensemble.bench.first_forward import of_image
from ensemble.bench.setup import in_float64
from ensemble.errors import InputError, UnavailableError
from ensemble.machine import memory
from ensemble.machine.devices import synchronize
from ensemble.machine.dtypes import NumericFormat, numeric_format
from ensemble.models import outputs, sources
from ensemble.models.outputs import class_count
from ensemble.strategies.reduction import with_reduction

PROFILE_ROUNDS = 5


@dataclass
class ShardStrategy:
    """A strategy built over this rank's models, and the communication of its calls."""

    name: str
    built: BuiltStrategy
    exchange: Exchange
    error: str = ""  # why a call failed on this rank
    forward_s: list[float] | None = None  # the time of each forward, while profiling


class RankWorker:
    """One rank."""

    def __init__(self, config: Config, group: Group, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.models: list[nn.Module] = []  # never rebound: it is shared with the workload
        self.weights = ""
        self._num_models = 0  # `models` is this rank's shard of them
        self._all: Sequence[nn.Module] = ()  # on rank 0: all models, for the speedup over one rank
        self._shape = torch.Size()
        self._example = torch.empty(0, device="cpu", dtype=torch.float32)
        self._strategies: dict[str, ShardStrategy] = {}

    def load(self, num_models: int, *, say: Callable[[str], None]) -> None:
        """Load this rank's shard of N models, and drop all others.

        Raises:
            InputError: fewer models than ranks, or an error of `sources.load`.
        """
        shard = shard_ranges(num_models, self.group.ranks)[self.group.rank]
        if num_models != self._num_models:
            self._strategies.clear()
            self.models.clear()
            self._all, self._num_models = (), 0
            self.models[:], self.weights = self._read(num_models, shard, say)
            self._num_models = num_models

    def configure(self, num_models: int, shape: tuple[int, ...]) -> list[RankReport]:
        """Switch to a grid point: N models, and inputs of this shape."""
        self._strategies.clear()
        self._shape = torch.Size(shape)
        try:
            self.load(num_models, say=lambda _: None)
            report = RankReport()
        except InputError as error:
            report = RankReport("failed", str(error))
        return self.group.all_gather_object(report)

    def predict(self, *, image: Tensor | None = None) -> list[Tensor]:
        """What each of the models gives for one image, `(classes,)` each, in their order."""
        x = self._exchange(torch.float32).distribute(image)
        with torch.inference_mode():
            own = [of_image(model(x)).cpu() for model in self.models]
        return [logits for part in self.group.all_gather_object(own) for logits in part]

    def build(self, name: str, dtype: str, *, example: Tensor | None = None) -> list[RankReport]:
        """Build a strategy over each rank's shard; it is kept if every rank could build it.

        An autotuned strategy is tuned on all ranks concurrently, as it will run. If the ranks
        choose differently, all build rank 0's choice.
        """
        for other in [key for key in self._strategies if key != REFERENCE]:
            del self._strategies[other]
        self._example = self._exchange(torch.float32).distribute(example).clone()
        key, numbers = strategy_key(name, dtype), numeric_format(dtype)
        reports = self.group.all_gather_object(self._build(key, name, numbers))
        choices = [report.choice.name if report.choice else None for report in reports]
        if choices[0] is not None and not any_failed(reports) and len(set(choices)) > 1:
            differs = choices[self.group.rank] != choices[0]
            again = self._build(key, choices[0], numbers) if differs else reports[self.group.rank]
            reports = self.group.all_gather_object(again)
        if any_failed(reports):
            self._strategies.pop(key, None)
        return reports

    def _build(self, key: str, name: str, numbers: NumericFormat) -> RankReport:
        self._strategies.pop(key, None)
        release_compiled()
        try:
            seconds = self.config.measure.tune_seconds
            built = build(name, self.models, self._example, numbers, tune_seconds=seconds)
        except UnavailableError as error:
            return RankReport("unavailable", str(error))
        except Exception as error:
            return RankReport("failed", explain(error, name, self.models, self._example, numbers))
        chosen = built.choice.name if built.choice else name
        self._strategies[key] = ShardStrategy(chosen, built, self._exchange(numbers.dtype))
        return RankReport(
            build_s=built.build_s,
            first_call_s=built.first_call_s,
            peak_memory_bytes=built.peak_memory_bytes,
            peak_reserved_bytes=built.peak_reserved_bytes,
            held_bytes=built.held_bytes,
            bytes_per_model=built.bytes_per_model,
            notes=built.notes,
            choice=built.choice,
        )

    def prepare_call(self, key: str) -> None:
        """Set the precision of the strategy, untimed, and wait at the barrier."""
        self._strategies[key].built.ready()
        self.group.barrier()

    def call(self, key: str, reduce: str, *, x: Tensor | None = None) -> Tensor | None:
        """One call over all ranks: the output for x, on rank 0. `prepare_call` precedes it."""
        strategy = self._strategies[key]
        with torch.inference_mode():
            part = strategy.exchange.distribute(x)
            logits = self._forward(strategy, part)
            return strategy.exchange.combine(logits, reduce, classes=class_count(self.models[0]))

    def call_errors(self, key: str) -> list[str]:
        """Why a call failed, on each rank; empty where none did."""
        return self.group.all_gather_object(self._strategies[key].error)

    def float64_logits(self, *, example: Tensor | None = None) -> list[Tensor | str]:
        """Each rank's logits in float64, or the reason why there are none."""
        x = self._exchange(torch.float32).distribute(example)
        logits, notes = optional("error to float64", partial(in_float64, self.models, x.clone()))
        return self.group.all_gather_object(notes[0] if logits is None else logits.cpu())

    def profile_call(self, key: str, *, x: Tensor | None = None) -> list[CallProfile]:
        """Attribute the time of a call, on each rank: see `measurement.RankTimes`."""
        strategy, on_one_rank = self._strategies[key], None
        notes = tuple[str, ...]()
        whole, alone, one_rank = list[float](), list[float](), list[float]()
        if x is not None and not strategy.error:
            make = partial(self._build_on_one_rank, strategy, x)
            on_one_rank, notes = optional("speedup over one rank", make)
        strategy.forward_s = forwards = list[float]()
        strategy.built.ready()
        for _ in range(1 + PROFILE_ROUNDS):  # the first is a warm-up
            strategy.forward_s = forwards
            whole.append(self._timed(partial(self.call, key, self.config.models.reduce, x=x)))
            strategy.forward_s = None
            forward = partial(self._forward, strategy, strategy.built.example)
            for rank in range(self.group.ranks):
                seconds = self._timed(forward if rank == self.group.rank else None)
                alone += [seconds] if rank == self.group.rank else []
            seconds = self._timed(on_one_rank.call if on_one_rank else None)
            one_rank += [seconds] if on_one_rank else []
        return self.group.all_gather_object(
            CallProfile(
                whole_s=tuple(whole[1:]),
                forward_s=tuple(forwards[1:]),
                alone_s=tuple(alone[1:]),
                one_rank_s=tuple(one_rank[1:]),
                notes=notes,
                error=strategy.error,
            )
        )

    def _timed(self, function: Callable[[], object] | None) -> float:
        """Seconds of a function after a barrier; without one, wait at the next barrier."""
        self.group.barrier()
        begin = time.perf_counter()
        if function is not None:
            with torch.inference_mode():
                function()
            synchronize(self.device)
        return time.perf_counter() - begin

    def _forward(self, strategy: ShardStrategy, x: Tensor) -> Tensor:
        """This rank's logits; wrong ones after a failure, so that the other ranks do not hang: the
        row fails with the reason."""
        begin = time.perf_counter()
        logits = None
        if not strategy.error:
            try:
                logits = strategy.built.forward(x)
            except Exception as error:
                example, numbers = strategy.built.example, strategy.built.numbers
                strategy.error = explain(error, strategy.name, self.models, example, numbers)
        if strategy.forward_s is not None:
            synchronize(self.device)
            strategy.forward_s.append(time.perf_counter() - begin)
        return _wrong(strategy.built.logits) if logits is None else logits

    def _build_on_one_rank(self, strategy: ShardStrategy, x: Tensor) -> BuiltStrategy:
        """The strategy over all N models on this rank alone, if they fit.

        Raises:
            UnavailableError: it may need more memory than is free, estimated from the shard.
        """
        peak, free = strategy.built.peak_memory_bytes, memory.available_bytes(self.device)
        needed = (peak or 0) * self._num_models / len(self.models)
        if free is not None and needed > free:
            message = f"it may take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise UnavailableError(message)
        all_models = range(self._num_models)
        self._all = self._all or self._read(self._num_models, all_models, lambda _: None)[0]
        alone = build(strategy.name, self._all, x.float(), strategy.built.numbers)
        how, classes = self.config.models.reduce, class_count(self.models[0])
        return replace(alone, timed_forward=with_reduction(alone.forward, how, classes=classes))

    def _exchange(self, dtype: torch.dtype) -> Exchange:
        shards = shard_ranges(self._num_models, self.group.ranks)
        return Exchange(self.group, shards, self._shape, dtype)

    def _read(
        self, num_models: int, shard: range, say: Callable[[str], None]
    ) -> tuple[Sequence[nn.Module], str]:
        return sources.load(
            self.config.models.model_path,
            arch=self.config.models.arch,
            num_models=num_models,
            device=self.device,
            seed=self.config.run.seed,
            say=say,
            block=shard,
            channels=self.config.models.channels,
            output=outputs.parse(self.config.models.output),
        )


def _wrong(outputs: Tensor) -> Tensor:
    """Outputs that agree with no others: NaN; of integers and booleans the bitwise complement."""
    is_exact = not (outputs.is_floating_point() or outputs.is_complex())
    return ~outputs if is_exact else torch.full_like(outputs, torch.nan)


def strategy_key(name: str, dtype: str) -> str:
    """The key of a built strategy; of the reference its name."""
    return name if name == REFERENCE and dtype == "float32" else f"{name} {dtype}"
