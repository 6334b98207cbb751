"""The exit reason of each rank, in torchrun's store, which outlives the ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ensemble.machine import launch

CONNECT_TIMEOUT_S = 10.0
# For the other ranks to record their reasons: each detects a closed connection within moments.
WAIT_S = 3.0
POLL_S = 0.05
REPORTED = "reported"  # key, set by the rank that prints the exit reason of the run


class ExitStore:
    """A separate connection to the store, used only when a rank joins and when the run ends."""

    def __init__(self) -> None:
        self._rank, self._ranks = launch.rank(), launch.world_size()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
        store = TCPStore(address, port, is_master=False, timeout=timeout)
        self._store = PrefixStore(f"resnet_vmap/{launch.attempt()}/exit", store)

    def record_host(self) -> None:
        """Record the host of this rank."""
        self._store.set(f"host/{self._rank}", launch.host())

    def record_reason(self, reason: str) -> None:
        """Record why this rank ends; empty if it only lost another rank."""
        self._store.set(f"reason/{self._rank}", reason)

    def claim_report(self) -> bool:
        """Is it up to this rank to report the exit reason of the run? True for one rank only."""
        return self._store.add(REPORTED, 1) == 1

    def wait_for_report(self) -> bool:
        """Give rank 0, which may be busy, time to report; has a rank reported?"""
        return _poll(lambda: self._store.check([REPORTED]))

    def first_failure(self) -> tuple[int | None, str]:
        """The first rank with a reason, and the reason.

        Else the first rank without any record, and an empty reason; None if every rank has one:
        then they only lost each other.
        """
        keys = [f"reason/{rank}" for rank in range(self._ranks)]

        def recorded() -> dict[int, str]:
            present = [rank for rank, key in enumerate(keys) if self._store.check([key])]
            return {rank: self._store.get(keys[rank]).decode() for rank in present}

        _poll(lambda: any(recorded().values()) or len(recorded()) == self._ranks)
        reasons = recorded()
        failed = [rank for rank, reason in reasons.items() if reason]
        missing = [rank for rank in range(self._ranks) if rank not in reasons]
        rank = next(iter(failed or missing), None)
        return rank, reasons.get(rank, "") if rank is not None else ""

    def rank_name(self, rank: int) -> str:
        """`rank 1 on host-b`."""
        key = f"host/{rank}"
        host = self._store.get(key).decode() if self._store.check([key]) else None
        return launch.rank_name(rank, host)


def _poll(condition: Callable[[], bool]) -> bool:
    """Poll for at most `WAIT_S`; the last value of the condition."""
    end = time.monotonic() + WAIT_S
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(POLL_S)
    return met
