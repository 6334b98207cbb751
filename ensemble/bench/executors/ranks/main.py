"""The program on a rank of torchrun: the first runs it, the others take the steps it announces."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ensemble.bench import cli
from ensemble.bench.executors.ranks import executor, failures, follower
from ensemble.errors import InputError, RankError
from ensemble.machine import launch, signals, streams


def main(argv: Sequence[str] | None, run: Callable[..., int]) -> int:
    """Be a rank; returns the exit code. `run` is the program's, given what loads and measures.

    What goes wrong is said in one line, by one rank.
    """
    signals.die_with_parent(os.getppid())  # a SIGKILL of torchrun reaches no rank
    if launch.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        config = cli.parse(argv)
        if launch.rank() > 0:
            return follower.follow(config)
        with streams.flush_on_exit():
            return run(config, executor.load, executor.over_ranks)
    except InputError as error:
        failures.tell(cli.in_flags(error))
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
