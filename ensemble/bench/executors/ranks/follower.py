"""A follower rank, any but rank 0: runs each step that the leader announces, without output."""

from __future__ import annotations

import logging

from ensemble.bench.config import Config
from ensemble.bench.executors.ranks import exit_reasons, group
from ensemble.bench.executors.ranks.join import join
from ensemble.bench.executors.ranks.rank_worker import RankWorker
from ensemble.errors import InputError, RankError, first_line

SHUTDOWN = "shutdown"

log = logging.getLogger(__name__)


def follow(config: Config) -> int:
    """Follow rank 0 until it has finished; returns the exit code."""
    if config.report.list_strategies or config.report.from_json:
        return 0  # nothing to measure
    try:
        worker, _ = join(config, say=lambda _: None)
        run_steps(worker)
    except RankError as error:
        group.destroy_group()
        exit_reasons.report_lost_rank(error)
        return 1
    except InputError:
        raise
    except Exception as error:
        log.debug("failed", exc_info=True)
        exit_reasons.report_failure(f"{type(error).__name__}: {first_line(error)}")
        return 1
    finally:
        group.destroy_group()
    return 0


def run_steps(worker: RankWorker) -> None:
    """Run announced steps until shutdown."""
    while True:
        step, arguments = worker.group.broadcast_object()
        if step == SHUTDOWN:
            return
        if step == RankWorker.call.__name__:
            worker.prepare_call(arguments[0])
        getattr(worker, step)(*arguments)
