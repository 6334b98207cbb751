"""The program on a rank of torchrun: rank 0 leads, the others follow."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ensemble.bench import cli
from ensemble.bench.executors.ranks import exit_reasons, follower, sharded_executor
from ensemble.errors import InputError, RankError
from ensemble.machine import launch, signals, streams


def main(argv: Sequence[str] | None, run: Callable[..., int]) -> int:
    """Run one rank; returns the exit code. `run` takes a loader and an executor.

    An error is reported in one line, by one rank.
    """
    signals.die_with_parent(os.getppid())  # a SIGKILL of torchrun reaches no rank
    if launch.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        config = cli.parse(argv)
        if launch.rank() > 0:
            return follower.follow(config)
        with streams.flush_on_exit():
            return run(config, sharded_executor.load, sharded_executor.over_ranks)
    except InputError as error:
        exit_reasons.report_failure(cli.in_flags(error))
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
