"""The program as one rank of torchrun, several runs in sequence: `torchrun_program.py FOLDER`.

FOLDER/runs.json holds the runs: a name, arguments, and extra arguments of rank 1. The output of
each rank and its exit code go to FOLDER/NAME.RANK.json. Some strategies break on rank 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble import strategies
from tests.bench.executors.dying_strategies import Made

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ensemble.strategies.build_result import BuildResult

CALLS = 8  # of a strategy before it breaks: during the timed calls


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("broke\nin two lines")


def interrupt() -> None:
    """As torchrun does to every rank after Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def breaking(how: Callable[[], None], on: Sequence[str] = ("1",)) -> Callable[..., BuildResult]:
    """The loop, which breaks on some ranks after some calls."""

    def builder(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
        from ensemble.strategies.build_result import BuildResult

        forward_of_loop, calls = strategies.build_unverified("loop", models, example).forward, [0]

        def forward(x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > CALLS and os.environ["RANK"] in on:
                how()
            return forward_of_loop(x)

        return BuildResult(forward)

    return builder


def slow(models: Sequence[nn.Module], example: torch.Tensor) -> BuildResult:
    """Rank 1 hangs for longer than the timeout."""
    time.sleep(7 * (os.environ["RANK"] == "1"))
    return strategies.build_unverified("loop", models, example)


def main(folder: Path) -> int:
    """Run all; the exit code of the last."""
    made = {"kill": breaking(kill), "fail": breaking(fail), "slow": slow}
    made["stop"] = breaking(interrupt, on=("0", "1"))
    for name, builder in made.items():
        strategies.STRATEGIES[name] = Made("", "", "made for a test", build=builder)
    import resnet_vmap  # whose flags know the strategies above

    code = 0
    for number, run in enumerate(json.loads((folder / "runs.json").read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # separate store keys
        out, err = io.StringIO(), io.StringIO()
        argv = run["argv"] + (run.get("rank 1", []) if os.environ["RANK"] == "1" else [])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = resnet_vmap.main(argv)
            except SystemExit as ended:  # after --help
                code = int(ended.code or 0)
        output: dict[str, Any] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        file = folder / f"{run['name']}.{os.environ['RANK']}.json"
        file.write_text(json.dumps(output))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
