"""Where ranks write how they ended: the store of torchrun, which outlives each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ensemble.machine import launch

CONNECT_S = 10.0
WAIT_S = 3.0  # for what the others write: each notices within moments that a connection is closed
STEP_S = 0.05
ONCE = "said"  # written by the one who says why the run ended


class Board:
    """A connection of its own, used only where a rank joins and where the run ends."""

    def __init__(self) -> None:
        self._rank, self._ranks = launch.rank(), launch.world_size()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=CONNECT_S)
        store = TCPStore(address, port, is_master=False, timeout=wait)
        self._store = PrefixStore(f"resnet_vmap/{launch.attempt()}/ended", store)

    def join(self) -> None:
        """Write where this rank is."""
        self._store.set(f"host/{self._rank}", launch.host())

    def write(self, cause: str) -> None:
        """Write why this rank ends; nothing where it only found that another has."""
        self._store.set(f"cause/{self._rank}", cause)

    def say(self) -> bool:
        """Is it for this rank to say why the run ends? For the first that asks."""
        return self._store.add(ONCE, 1) == 1

    def wait_until_said(self) -> bool:
        """Leave it to rank 0, which may be busy; has it spoken?"""
        return _until(lambda: self._store.check([ONCE]))

    def read(self) -> tuple[int | None, str]:
        """The first rank that wrote a cause, and the cause; else the first that wrote nothing at
        all and an empty one, None where all did: they only lost each other."""
        keys = [f"cause/{rank}" for rank in range(self._ranks)]

        def causes() -> dict[int, str]:
            there = [rank for rank, key in enumerate(keys) if self._store.check([key])]
            return {rank: self._store.get(keys[rank]).decode() for rank in there}

        _until(lambda: any(causes().values()) or len(causes()) == self._ranks)
        found = causes()
        told = [rank for rank, cause in found.items() if cause]
        silent = [rank for rank in range(self._ranks) if rank not in found]
        rank = next(iter(told or silent), None)
        return rank, found.get(rank, "") if rank is not None else ""

    def name(self, rank: int) -> str:
        """`rank 1 on host-b`."""
        key = f"host/{rank}"
        host = self._store.get(key).decode() if self._store.check([key]) else None
        return launch.rank_name(rank, host)


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(STEP_S)
    return met
