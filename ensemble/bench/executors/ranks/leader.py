"""Rank 0: it announces each step, takes it with the others, checks what came of it, and times."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ensemble.bench import session, workload
from ensemble.bench.config import Config
from ensemble.bench.executors import in_process
from ensemble.bench.executors.ranks import failures, group, runner
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.follower import LEAVE
from ensemble.bench.executors.ranks.join import begin
from ensemble.bench.executors.ranks.member import Member
from ensemble.bench.executors.ranks.sharding import blocks
from ensemble.bench.records import (
    Case,
    Environment,
    Result,
    Run,
)
from ensemble.bench.setup import Cell, assemble, make_example
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, RankError, first_line


class Lead:
    """Rank 0's side of every step."""

    def __init__(self, member: Member, ranks: tuple[Facts, ...]) -> None:
        self.member, self.ranks = member, ranks

    def all(self, step: Callable[..., Any], *arguments: object, **of_rank_0: object) -> Any:
        """Announce a step of `Member`, and take it; `of_rank_0` is what rank 0 alone has."""
        self.member.group.tell((step.__name__, arguments))
        return step(*arguments, **of_rank_0)

    def announce_call(self, key: str, reduce: str) -> None:
        """All ranks come together; what follows is a call."""
        self.member.group.tell((self.member.call.__name__, (key, reduce)))
        self.member.group.meet()

    def dismiss(self) -> None:
        """The others may leave."""
        self.member.group.tell((LEAVE, ()))
        group.leave()


@dataclass(frozen=True)
class ShardedWorkload(Workload):
    """Of the models those of rank 0; the images of all."""

    lead: Lead

    def see(self, image: Tensor, count: int) -> list[Tensor]:
        if count <= len(self.models):
            return super().see(image, count)
        self.lead.all(self.lead.member.open, count, tuple(image.shape))
        logits: list[Tensor] = self.lead.all(self.lead.member.see, image=image)
        return logits

    def on_one_device(self, num_models: int) -> int:
        return len(blocks(num_models, len(self.lead.ranks))[0])

    def device_name(self, config: Config) -> str:
        hosts = list(dict.fromkeys(facts.host for facts in self.lead.ranks))
        places = "; ".join(dict.fromkeys(facts.place for facts in self.lead.ranks))
        backend = self.lead.member.group.backend
        return f"{len(self.lead.ranks)} ranks on {', '.join(hosts)} by {backend}: {places}"

    def describe(self, config: Config, *, first_forward_s: float) -> Environment:
        ranks = self.lead.ranks
        return replace(
            super().describe(config, first_forward_s=first_forward_s),
            ranks=len(ranks),
            backend=self.lead.member.group.backend,
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
        workload.tell_image(config, images, say=say)
        if config.verbose:
            say(str(member.models[0]))
        return ShardedWorkload(
            member.device, member.models, member.weights, images, Lead(member, ranks)
        )


def measure(
    config: Config,
    cases: Sequence[Case],
    run: Run,
    workload: Workload,
    progress: in_process.Progress,
    row: str,
) -> Generator[tuple[Result, ...]]:
    """Each case on all ranks: what `session.measure_all` is given.

    Raises:
        RankError: a rank has ended; the message says which, and why.
    """
    assert isinstance(workload, ShardedWorkload)
    lead = workload.lead

    def make(cell: Sequence[Case]) -> Cell | str:
        case = cell[0]
        images = workload.images(case.image_size)
        example = make_example(images, case)
        opened = lead.all(lead.member.open, case.num_models, tuple(example.shape))
        problem = runner.problem(opened, lead.ranks)
        ranked = runner.of_ranks(lead, example, config)
        return problem or assemble(cell, ranked, workload.models, images)

    with _explained():
        try:
            yield from session.in_this_process(
                config, cases, run, workload, progress, row, make=make
            )
        except GeneratorExit:  # between two rows, where all wait for the next step
            lead.dismiss()
            raise
        lead.dismiss()


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
