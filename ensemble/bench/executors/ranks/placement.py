"""The placement of a rank: its device, its threads, and on a CPU its pinned cores."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ensemble.bench.config import RunOptions
from ensemble.bench.executors.ranks.sharding import shard_ranges
from ensemble.errors import InputError
from ensemble.formatting import count
from ensemble.machine import cores as machine_cores
from ensemble.machine import devices
from ensemble.machine.cores import THREADS


@dataclass(frozen=True)
class Placement:
    """The device of a rank by name, its CPU threads, and its pinned cores, None if not pinned."""

    device: str
    threads: int
    cores: tuple[int, ...] | None

    def describe(self) -> str:
        """`cpu, 1 thread, core 0`."""
        threads = count(self.threads, "thread")
        cores = "not pinned"
        if self.cores is not None:
            names = " ".join(map(str, self.cores))
            cores = f"core{'s' if len(self.cores) > 1 else ''} {names}"
        return f"{self.device}, {threads}, {cores}"


def resolve(run: RunOptions, *, local_rank: int, local_ranks: int) -> Placement:
    """The placement of a rank among the ranks of its host.

    Raises:
        InputError: a device with an index, which all ranks would share.
    """
    kind, _, index = run.device.partition(":")
    if index:
        message = f"expected {kind} under torchrun: a rank takes the device of its local rank"
        raise InputError(f"{message}, got {run.device}", argument="device")
    if kind == "auto":
        kind = devices.find_device("auto").type
    available = _available_cores()
    cores = cores_of_rank(available, local_rank=local_rank, local_ranks=local_ranks)
    threads = run.threads or _requested_threads(local_ranks) or _default_threads(cores, local_ranks)
    pinned = kind == "cpu" and threads <= len(cores) and hasattr(os, "sched_setaffinity")
    device = "cpu" if kind == "cpu" else f"{kind}:{_device_index(local_rank)}"
    return Placement(device, threads, cores if pinned else None)


def pin(place: Placement) -> None:
    """Pin this thread, and those that it will start, to the cores of its placement.

    Call it after joining the group, so that gloo's thread stays unpinned: pinned to the single core
    of its rank it waited for a time slice, and half of all messages took 3.5 ms, not 0.2.
    """
    if place.cores is not None:
        os.sched_setaffinity(0, place.cores)


def cores_of_rank(cores: tuple[int, ...], *, local_rank: int, local_ranks: int) -> tuple[int, ...]:
    """The cores of one rank: disjoint ones, or one shared core if ranks outnumber cores."""
    if local_ranks > len(cores):
        return (cores[local_rank % len(cores)],)
    block = shard_ranges(len(cores), local_ranks)[local_rank]
    return cores[block.start : block.stop]


def _device_index(local_rank: int) -> int:
    """The device of the local rank; the only visible one where a scheduler gives each rank its own
    (`srun --gpus-per-task 1`, a `CUDA_VISIBLE_DEVICES` of each rank). Ranks that would share a
    device are rejected by `environment_check`."""
    return 0 if torch.accelerator.device_count() == 1 else local_rank


def _default_threads(cores: tuple[int, ...], local_ranks: int) -> int:
    """One per core, and no more than this rank's part of a CPU quota."""
    quota = machine_cores.detect().quota
    return len(cores) if quota is None else min(len(cores), max(1, math.ceil(quota / local_ranks)))


def _available_cores() -> tuple[int, ...]:
    return machine_cores.affinity() or tuple(range(os.cpu_count() or 1))


def _requested_threads(local_ranks: int) -> int | None:
    """The user's OMP_NUM_THREADS. torchrun sets it to 1 if it is unset and there are several ranks;
    torchrun's own environment (Linux) shows which of the two it is."""
    value = os.environ.get(THREADS, "")
    if not value.isdigit() or int(value) < 1:
        return None
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None if value == "1" and local_ranks > 1 else int(value)
    is_set = any(line.startswith(f"{THREADS}=".encode()) for line in environment)
    return int(value) if is_set else None
