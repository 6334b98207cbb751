"""Where a rank runs: its device, its threads, and on a CPU the cores that are its own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ensemble.bench.config import RunOptions
from ensemble.bench.executors.ranks.sharding import blocks
from ensemble.errors import InputError
from ensemble.formatting import count
from ensemble.machine import cores as machine_cores
from ensemble.machine.cores import THREADS


@dataclass(frozen=True)
class Place:
    """The device of a rank by name, its CPU threads, and its cores where it is held to some."""

    device: str
    threads: int
    cores: tuple[int, ...] | None

    def words(self) -> str:
        """`cpu, 1 thread, core 0`."""
        threads = count(self.threads, "thread")
        cores = "not pinned"
        if self.cores is not None:
            names = " ".join(map(str, self.cores))
            cores = f"core{'s' if len(self.cores) > 1 else ''} {names}"
        return f"{self.device}, {threads}, {cores}"


def find(run: RunOptions, *, local_rank: int, local_ranks: int) -> Place:
    """The place of a rank among those of its host.

    Raises:
        InputError: a device with an index of its own, which all ranks would share.
    """
    kind, _, index = run.device.partition(":")
    if index:
        message = f"expected {kind} under torchrun: a rank takes the device of its local rank"
        raise InputError(f"{message}, found {run.device}", argument="device")
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = accelerator.type if accelerator else "cpu"
    available = _available_cores()
    share = share_of(available, local_rank=local_rank, local_ranks=local_ranks)
    threads = run.threads or _asked_threads(local_ranks) or _own_threads(share, local_ranks)
    pinned = kind == "cpu" and threads <= len(share) and hasattr(os, "sched_setaffinity")
    device = "cpu" if kind == "cpu" else f"{kind}:{local_rank}"
    return Place(device, threads, share if pinned else None)


def pin(place: Place) -> None:
    """Hold this thread, and those that it will start, to the cores of its place.

    To be called once the group is joined: gloo's own thread stays free. Held to the one core of
    its rank it waited for that thread's time to end: half of all messages took 3.5 ms, not 0.2.
    """
    if place.cores is not None:
        os.sched_setaffinity(0, place.cores)


def share_of(cores: tuple[int, ...], *, local_rank: int, local_ranks: int) -> tuple[int, ...]:
    """The cores of one rank: apart from the others', or one of its own where ranks are more."""
    if local_ranks > len(cores):
        return (cores[local_rank % len(cores)],)
    share = blocks(len(cores), local_ranks)[local_rank]
    return cores[share.start : share.stop]


def _own_threads(share: tuple[int, ...], local_ranks: int) -> int:
    """One a core, and no more than the ranks' part of a quota of CPU time."""
    quota = machine_cores.detect().quota
    return len(share) if quota is None else min(len(share), max(1, math.ceil(quota / local_ranks)))


def _available_cores() -> tuple[int, ...]:
    return machine_cores.affinity() or tuple(range(os.cpu_count() or 1))


def _asked_threads(local_ranks: int) -> int | None:
    """What the user set OMP_NUM_THREADS to. torchrun sets it to 1 for several ranks where nobody
    has: its own environment, as it was started with, tells one from the other (Linux)."""
    value = os.environ.get(THREADS, "")
    if not value.isdigit() or int(value) < 1:
        return None
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None if value == "1" and local_ranks > 1 else int(value)
    asked = any(line.startswith(f"{THREADS}=".encode()) for line in environment)
    return int(value) if asked else None
