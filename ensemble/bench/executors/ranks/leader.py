"""The leader, rank 0: announces each step, and runs it together with the followers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ensemble.bench.executors.ranks import group
from ensemble.bench.executors.ranks.environment_check import RankInfo
from ensemble.bench.executors.ranks.follower import SHUTDOWN
from ensemble.bench.executors.ranks.rank_worker import RankWorker


class Leader:
    """Rank 0, with the information on all ranks."""

    def __init__(self, worker: RankWorker, ranks: tuple[RankInfo, ...]) -> None:
        self.worker, self.ranks = worker, ranks

    def run_step(self, step: Callable[..., Any], *arguments: object, **leader_only: object) -> Any:
        """Announce a step of `RankWorker`, and run it; `leader_only` is what only rank 0 has."""
        self.worker.group.broadcast_object((step.__name__, arguments))
        return step(*arguments, **leader_only)

    def announce_call(self, key: str, reduce: str) -> None:
        """Announce a call and prepare it on all ranks; the call itself follows."""
        self.worker.group.broadcast_object((self.worker.call.__name__, (key, reduce)))
        self.worker.prepare_call(key)

    def shut_down(self) -> None:
        """Let the followers exit."""
        self.worker.group.broadcast_object((SHUTDOWN, ()))
        group.destroy_group()
