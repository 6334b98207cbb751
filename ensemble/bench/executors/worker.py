"""A worker process: this program started afresh, to measure one case, and to say one record.

`main`, started by `workers.START` with PARENT STRATEGY DEVICE, imports what it needs and says that
it is ready; it then reads a job from its standard input, a line of JSON, and writes messages to its
standard output, a line of JSON each: stages while it works, then the row, and the reference's half
of its pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import fields
from importlib import import_module
from typing import IO, Any

from ensemble import gc_pause
from ensemble.bench.config import Config
from ensemble.bench.records import Case
from ensemble.machine.signals import end_with_parent

READY = "ready"


def main() -> None:
    """Measure the case of the job on standard input."""
    messages = _own_output()
    parent, *needed = sys.argv[1:]
    end_with_parent(int(parent))

    def say(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    with gc_pause.imported_for_good():
        from ensemble.bench import workload
        from ensemble.bench.measure import reference_row
        from ensemble.bench.records import Result
        from ensemble.bench.report.exports import row_of
        from ensemble.bench.setup import make_cell

        _import_for(*needed)
    say({"stage": READY})
    line = sys.stdin.readline()
    if not line:  # the parent has ended, or given up
        return
    job = json.loads(line)
    measure = import_module(job["row"]).measure
    config, case = config_of(job["config"]), Case(**job["case"])
    shared = workload.load_shared(job["shared"], config, device=job["device"])
    is_first = job["number"] == 0
    cell = make_cell([case], shared.models, shared.images, config, is_first=is_first)
    if isinstance(cell, str):
        say({"row": row_of(Result(case, status="failed", error=cell)), "reference": None})
        return
    result = measure(
        *(case, cell, config),
        progress=lambda stage, done: say({"stage": stage, "done": done}),
        picked=job["picked"],
    )
    beside = reference_row(result, cell)
    say({"row": row_of(result), "reference": beside and row_of(beside)})


def config_of(values: dict[str, Any]) -> Config:
    """A configuration of its plain values, see `Config.plain`."""
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    names = {field.name for field in fields(Config)}
    return Config(**{name: value for name, value in (values | tuples).items() if name in names})


def _import_for(strategy: str, device: str) -> None:
    """Import what building the strategy would: workers do it at once, and no row's time has it.

    What cannot be imported is said by the row.
    """
    import torch

    from ensemble.strategies import (
        BEST,
        HYBRIDS,
        STRATEGIES,
        best,
    )

    names = {strategy}
    if strategy in HYBRIDS:
        names = {HYBRIDS[strategy].alone, HYBRIDS[strategy].together}
    elif strategy == BEST:
        names.update(best.candidates(torch.device(device), torch.float32))
    for name in STRATEGIES.keys() & names:
        with contextlib.suppress(Exception):
            STRATEGIES[name].builder()


def _own_output() -> IO[str]:
    """Standard output for messages alone: what else prints there goes to standard error."""
    sys.stdout.flush()
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages
