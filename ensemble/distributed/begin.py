"""How a rank begins: its place, the group, its models; and that all ranks are alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from ensemble.command_line import in_flags
from ensemble.distributed import alike, faults, group, placing
from ensemble.distributed.alike import Facts
from ensemble.distributed.board import Board
from ensemble.distributed.group import Group
from ensemble.distributed.member import Member
from ensemble.distributed.sharding import blocks
from ensemble.errors import InputError, RankError, first_line
from ensemble.machine import devices, launch
from ensemble.models import workload
from ensemble.options import Config


def begin(config: Config, *, say: Callable[[str], None]) -> tuple[Member, tuple[Facts, ...]]:
    """This rank with its share of the models of the largest N, and what each rank says of itself.

    Raises:
        InputError: on all ranks, where one of them cannot work or is not like the others.
        RankError: a rank has ended.
    """
    faults.watch()
    try:
        Board().join()
    except RuntimeError as error:
        raise RankError(f"no answer from torchrun's store: {first_line(error)}") from error
    timeout_s = 60 * config.timeout_minutes
    joined = group.join(timeout_s=timeout_s)
    facts = Facts(host=launch.host(), pid=os.getpid())
    member = None
    try:
        member, facts = _prepared(config, joined, facts, say)
    except InputError as error:
        facts = replace(facts, error=in_flags(error))
    ranks = tuple(joined.collect(facts))
    alike.check(ranks)
    assert member is not None  # or its error would have been found
    joined.use(member.device, timeout_s=timeout_s)
    return member, ranks


def _prepared(
    config: Config, joined: Group, facts: Facts, say: Callable[[str], None]
) -> tuple[Member, Facts]:
    blocks(min(config.num_models), joined.ranks)  # or it would be found in the middle of the run
    place = placing.find(config, local_rank=launch.local_rank(), local_ranks=launch.local_ranks())
    placing.pin(place)
    placed = replace(config, threads=place.threads)
    device = workload.prepare(placed, device=place.device)
    member = Member(placed, joined, device)
    member.load(max(config.num_models), say=say)
    return member, replace(
        facts,
        place=place.words(),
        device_name=devices.device_name(device),
        shared=alike.shared(placed, device, member.weights, member.models[0]),
    )
