"""All ranks but the first: take each step that rank 0 announces, and be silent."""

from __future__ import annotations

import logging

from ensemble.bench.config import Config
from ensemble.bench.executors.ranks import failures, group
from ensemble.bench.executors.ranks.join import begin
from ensemble.bench.executors.ranks.member import Member
from ensemble.errors import InputError, RankError, first_line

LEAVE = "leave"

log = logging.getLogger(__name__)


def follow(config: Config) -> int:
    """Be a rank until rank 0 has finished; returns the exit code."""
    if config.report.list_strategies or config.report.from_json:
        return 0  # nothing is run
    try:
        member, _ = begin(config, say=lambda _: None)
        take_steps(member)
    except RankError as error:
        group.leave()
        failures.noticed(first_line(error))
        return 1
    except InputError:
        raise
    except Exception as error:
        log.debug("failed", exc_info=True)
        failures.tell(f"{type(error).__name__}: {first_line(error)}")
        return 1
    finally:
        group.leave()
    return 0


def take_steps(member: Member) -> None:
    """Take steps until the one to leave."""
    while True:
        step, arguments = member.group.tell()
        if step == LEAVE:
            return
        if step == Member.call.__name__:
            member.group.meet()
        getattr(member, step)(*arguments)
