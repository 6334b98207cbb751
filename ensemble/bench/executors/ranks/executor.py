"""The executor of rank 0: the models are sharded over all ranks, which take every step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ensemble.bench import workload
from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.environment import Environment
from ensemble.bench.executors import in_process
from ensemble.bench.executors.executor import Execute
from ensemble.bench.executors.ranks import backend, failures, group
from ensemble.bench.executors.ranks.join import begin
from ensemble.bench.executors.ranks.leader import Leader
from ensemble.bench.executors.ranks.sharding import blocks
from ensemble.bench.setup import Setup, SetupError, make_example, make_setup
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, RankError, first_line


@dataclass(frozen=True)
class ShardedWorkload(Workload):
    """Of the models those of rank 0; the images of all."""

    leader: Leader

    def see(self, image: Tensor, count: int) -> list[Tensor]:
        if count <= len(self.models):
            return super().see(image, count)
        self.leader.all(self.leader.member.open, count, tuple(image.shape))
        logits: list[Tensor] = self.leader.all(self.leader.member.see, image=image)
        return logits

    def on_one_device(self, num_models: int) -> int:
        return len(blocks(num_models, len(self.leader.ranks))[0])

    def device_name(self, config: Config) -> str:
        hosts = list(dict.fromkeys(facts.host for facts in self.leader.ranks))
        places = "; ".join(dict.fromkeys(facts.place for facts in self.leader.ranks))
        backend = self.leader.member.group.backend
        return f"{len(self.leader.ranks)} ranks on {', '.join(hosts)} by {backend}: {places}"

    def describe(self, config: Config, *, first_forward_s: float) -> Environment:
        ranks = self.leader.ranks
        return replace(
            super().describe(config, first_forward_s=first_forward_s),
            ranks=len(ranks),
            backend=self.leader.member.group.backend,
            hosts=tuple(facts.host for facts in ranks),
            rank_devices=tuple(
                f"{facts.place}{f', {facts.device_name}' if facts.device_name else ''}"
                for facts in ranks
            ),
        )


def load(config: Config, *, say: Callable[[str], None]) -> Workload:
    """Join the other ranks, each with its share of the models; the workload of rank 0.

    Raises:
        InputError: bad input here, or a rank that cannot work or is not like this one.
        RankError: a rank has ended.
    """
    with _explained():
        member, ranks = begin(config, say=say)
        images = workload.read_images(config, member.device)
        workload.report_image(config, images, say=say)
        if config.report.verbose:
            say(str(member.models[0]))
        return ShardedWorkload(
            member.device, member.models, member.weights, images, Leader(member, ranks)
        )


@contextmanager
def over_ranks(config: Config, workload: Workload) -> Iterator[Execute]:
    """An executor that measures each case on all ranks.

    Raises:
        RankError: a rank has ended; the message says which, and why.
    """
    assert isinstance(workload, ShardedWorkload)
    leader = workload.leader

    def make(cell: Sequence[Case]) -> Setup:
        case = cell[0]
        images = workload.images(case.image_size)
        example = make_example(images, case)
        opened = leader.all(leader.member.open, case.num_models, tuple(example.shape))
        problem = backend.problem(opened, leader.ranks)
        if problem:
            raise SetupError(problem)
        built_on = backend.of_ranks(leader, example, config.models.reduce)
        return make_setup(cell, built_on, workload.models, images)

    with _explained():
        yield partial(in_process.execute, make, config)
        leader.dismiss()


@contextmanager
def _explained() -> Iterator[None]:
    """A rank that is gone, by name and cause; asked with the connections closed, so that the other
    ranks notice too and answer."""
    try:
        yield
    except RankError as error:
        group.leave()
        raise RankError(failures.found(first_line(error))) from error
    except InputError:
        group.leave()
        raise
    except KeyboardInterrupt as error:
        if failures.was_terminated():
            group.leave()
            raise RankError(failures.found("stopped by SIGTERM")) from error
        failures.quiet()
        group.leave()
        raise
