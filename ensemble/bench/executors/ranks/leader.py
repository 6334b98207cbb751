"""Rank 0's side of every step: it announces a step, and takes it with the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ensemble.bench.executors.ranks import group
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.follower import LEAVE
from ensemble.bench.executors.ranks.member import Member


class Leader:
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
