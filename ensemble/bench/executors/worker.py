"""A worker process: it measures one task, and reports raw values as JSON.

`main`, started by `fresh_process.START` with PARENT STRATEGY DEVICE, imports what it needs and
reports that it is ready. It then reads a job, a line of JSON, from its standard input, and writes
messages to its standard output, a line of JSON each: stages while it works, then the measurement,
and the reference's half of its pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import IO, Any

from ensemble import gc_pause
from ensemble.bench.case import Case, Task
from ensemble.bench.config import config_of
from ensemble.machine.signals import die_with_parent

READY = "ready"


def main() -> None:
    """Measure the task on standard input."""
    messages = _own_output()
    parent, *needed = sys.argv[1:]
    die_with_parent(int(parent))

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    with gc_pause.paused_then_frozen():
        from ensemble.bench import workload
        from ensemble.bench.executors.in_process import measure_task, setup_of
        from ensemble.bench.measure import measurement_of_reference
        from ensemble.bench.measurement import FAILED, Measurement
        from ensemble.bench.result_file import plain_measurement
        from ensemble.bench.setup import SetupError

        _import_for(*needed)
    send({"stage": READY})
    line = sys.stdin.readline()
    if not line:  # the parent has ended, or timed out
        return
    job = json.loads(line)
    config, task = config_of(job["config"]), task_of(job["task"])
    shared = workload.load_shared(job["shared"], config, device=job["device"])
    try:
        setup = setup_of(config, shared, [task.case], is_first=task.process == 0)
    except SetupError as error:
        failed = Measurement(task.case, FAILED, str(error))
        send({"measurement": plain_measurement(failed), "reference": None})
        return
    found = measure_task(
        task, setup, config, on_stage=lambda stage, done: send({"stage": stage, "done": done})
    )
    reference = measurement_of_reference(found, setup)
    send(
        {
            "measurement": plain_measurement(found),
            "reference": reference and plain_measurement(reference),
        }
    )


def task_of(values: dict[str, Any]) -> Task:
    """A task of its plain values."""
    return Task(**{**values, "case": Case(**values["case"])})


def _import_for(strategy: str, device: str) -> None:
    """Import what building the strategy imports: workers do so at once, and it is not timed.

    The measurement reports what cannot be imported.
    """
    import torch

    from ensemble.strategies import BEST, HYBRIDS, best, find

    names = {strategy}
    if strategy in HYBRIDS:
        names = {HYBRIDS[strategy].few, HYBRIDS[strategy].many}
    elif strategy == BEST:
        names.update(best.candidates(torch.device(device), torch.float32))
    for found in filter(None, map(find, names)):
        with contextlib.suppress(Exception):
            found.builder()


def _own_output() -> IO[str]:
    """Standard output for messages alone: whatever else prints there goes to standard error."""
    sys.stdout.flush()
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages
