"""How a rank begins: its place, the group, its models; and that all ranks are alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from ensemble.bench import workload
from ensemble.bench.cli import in_flags
from ensemble.bench.config import Config
from ensemble.bench.executors.ranks import (
    environment_check,
    failures,
    group,
    placement,
)
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.exit_store import Board
from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.member import Member
from ensemble.bench.executors.ranks.sharding import blocks
from ensemble.errors import InputError, RankError, first_line
from ensemble.machine import devices, launch


def begin(config: Config, *, say: Callable[[str], None]) -> tuple[Member, tuple[Facts, ...]]:
    """This rank with its share of the models of the largest N, and what each rank says of itself.

    Raises:
        InputError: on all ranks, where one of them cannot work or is not like the others.
        RankError: a rank has ended.
    """
    failures.watch()
    try:
        Board().join()
    except RuntimeError as error:
        raise RankError(f"no answer from torchrun's store: {first_line(error)}") from error
    timeout_s = 60 * config.measure.timeout_minutes
    joined = group.join(timeout_s=timeout_s)
    facts = Facts(host=launch.host(), pid=os.getpid())
    member = None
    try:
        member, facts = _prepared(config, joined, facts, say)
    except InputError as error:
        facts = replace(facts, error=in_flags(error))
    ranks = tuple(joined.collect(facts))
    environment_check.check(ranks)
    assert member is not None  # or its error would have been found
    joined.use(member.device, timeout_s=timeout_s)
    return member, ranks


def _prepared(
    config: Config, joined: Group, facts: Facts, say: Callable[[str], None]
) -> tuple[Member, Facts]:
    blocks(
        min(config.models.num_models), joined.ranks
    )  # or it would be found in the middle of the run
    place = placement.find(
        config.run, local_rank=launch.local_rank(), local_ranks=launch.local_world_size()
    )
    placement.pin(place)
    placed = replace(config, run=replace(config.run, threads=place.threads))
    device = workload.prepare(placed, device=place.device)
    member = Member(placed, joined, device)
    member.load(max(config.models.num_models), say=say)
    return member, replace(
        facts,
        place=place.words(),
        device_name=devices.device_name(device),
        shared=environment_check.shared(placed, device, member.weights, member.models[0]),
    )
