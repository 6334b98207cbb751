"""How a rank joins the run: placement, process group, its shard, and the environment check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from ensemble.bench import workload
from ensemble.bench.cli import in_flags
from ensemble.bench.config import Config
from ensemble.bench.executors.ranks import (
    environment_check,
    exit_reasons,
    group,
    placement,
)
from ensemble.bench.executors.ranks.environment_check import RankInfo
from ensemble.bench.executors.ranks.exit_store import ExitStore
from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.rank_worker import RankWorker
from ensemble.bench.executors.ranks.sharding import shard_ranges
from ensemble.errors import InputError, RankError, first_line
from ensemble.machine import devices, launch


def join(config: Config, *, say: Callable[[str], None]) -> tuple[RankWorker, tuple[RankInfo, ...]]:
    """This rank with its shard of the largest N, and the information on every rank.

    Raises:
        InputError: on all ranks, if one of them cannot work or differs from rank 0.
        RankError: a rank has ended.
    """
    exit_reasons.install_sigterm_handler()
    try:
        ExitStore().record_host()
    except RuntimeError as error:
        raise RankError(f"no answer from torchrun's store: {first_line(error)}") from error
    joined = group.init_group(timeout_s=60 * config.measure.timeout_minutes)
    info = RankInfo(host=launch.host(), pid=os.getpid())
    worker = None
    try:
        worker, info = _prepare(config, joined, info, say)
    except InputError as error:
        info = replace(info, error=in_flags(error))
    ranks = tuple(joined.all_gather_object(info))
    environment_check.check(ranks)
    assert worker is not None  # else the check has raised its error
    joined.use_device(worker.device)
    return worker, ranks


def _prepare(
    config: Config, joined: Group, info: RankInfo, say: Callable[[str], None]
) -> tuple[RankWorker, RankInfo]:
    shard_ranges(min(config.models.num_models), joined.ranks)  # fail before the run, not in it
    place = placement.resolve(
        config.run, local_rank=launch.local_rank(), local_ranks=launch.local_world_size()
    )
    placement.pin(place)
    placed = replace(config, run=replace(config.run, threads=place.threads))
    device = workload.prepare(placed, device=place.device)
    worker = RankWorker(placed, joined, device)
    worker.load(max(config.models.num_models), say=say)
    return worker, replace(
        info,
        placement=place.describe(),
        device_name=devices.device_name(device),
        device_id=devices.device_uuid(device),
        settings=environment_check.shared_settings(
            placed, device, worker.weights, worker.models[0]
        ),
    )
