"""A worker process: it measures tasks, or looks at the device, and reports raw values as JSON.

`main`, started by `fresh_process.START` with PARENT ARCH STRATEGY ... DEVICE, imports what it needs
and reports that it is ready: until then it creates no context on the device. It then reads a job,
a line of JSON, from its standard input, and writes messages to its standard output, a line of JSON
each: stages while it works, then the measurement of each task, the first with the reference's half
of its pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from ensemble import gc_pause
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config, config_of
from ensemble.errors import first_line
from ensemble.formatting import count
from ensemble.machine.signals import die_with_parent

if TYPE_CHECKING:
    import torch

    from ensemble.bench.measurement import Measurement
    from ensemble.bench.setup import Setup

READY = "ready"


def main() -> None:
    """Do the job on standard input."""
    messages = _own_output()
    parent, arch, *strategies, device = sys.argv[1:]
    die_with_parent(int(parent))

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    with gc_pause.paused_then_frozen():
        from ensemble.bench.executors import device_probe, in_process  # noqa: F401

        _import_for(arch, strategies, device)
    send({"stage": READY})
    line = sys.stdin.readline()
    if not line:  # the parent has ended, or timed out
        return
    job = json.loads(line)
    if "probe" in job:
        send(device_probe.answer(job))
    else:
        _measure(job, send)


def _measure(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Measure the tasks of a job, cases of one grid point, until one fails."""
    from ensemble.bench.executors.in_process import measure_task
    from ensemble.bench.measure import measurement_of_reference
    from ensemble.bench.measurement import FAILED, Measurement
    from ensemble.bench.result_file import plain_measurement
    from ensemble.bench.setup import SetupError

    config, tasks = config_of(job["config"]), [task_of(values) for values in job["tasks"]]
    try:
        setup = _setup(job, config, tasks)
    except SetupError as error:
        failed = Measurement(tasks[0].case, FAILED, str(error))
        send({"measurement": plain_measurement(failed), "reference": None, "continues": False})
        return
    reference = None
    for task in tasks:
        found = measure_task(
            task, setup, config, on_stage=lambda stage, done: send({"stage": stage, "done": done})
        )
        is_first = reference is None  # its calls alone, of which there are no others
        reference = reference or measurement_of_reference(found, setup)
        send(
            {
                "measurement": plain_measurement(found),
                "reference": plain_measurement(reference) if reference and is_first else None,
                "continues": (continues := _is_whole(found, setup.example.device)),
            }
        )
        if not continues:
            return


def _is_whole(found: Measurement, device: torch.device) -> bool:
    """Is this process fit for another row? A failed one may have left memory, or an error of the
    CUDA context, which every later call reports; one that was refused at its build has not, if the
    device still answers."""
    from ensemble.bench.measurement import OK, UNAVAILABLE
    from ensemble.machine.devices import synchronize

    if found.status != UNAVAILABLE:
        return found.status == OK
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def _setup(job: dict[str, Any], config: Config, tasks: Sequence[Task]) -> Setup:
    """The setup of the tasks' grid point, with the models of the job on its device.

    Raises:
        SetupError: the reference failed, or the models cannot be loaded: the device is out of
            memory, or refuses this process.
    """
    from ensemble.bench import workload
    from ensemble.bench.executors.in_process import setup_of
    from ensemble.bench.setup import SetupError

    cases, device = [task.case for task in tasks], job["device"]
    try:
        shared = workload.load_shared(
            job["shared"], config, device=device, num_models=cases[0].num_models
        )
    except Exception as error:
        models = count(cases[0].num_models, "model")
        why = f"{type(error).__name__}: {first_line(error)}"
        raise SetupError(f"loading {models} on {device} failed: {why}") from error
    return setup_of(config, shared, cases, is_first=any(task.process == 0 for task in tasks))


def task_of(values: dict[str, Any]) -> Task:
    """A task of its plain values."""
    return Task(**{**values, "case": Case(**values["case"])})


def _import_for(arch: str, strategies: Sequence[str], device: str) -> None:
    """Import what the architecture and building the strategies import: workers do so at once, and
    it is not timed.

    The measurement reports what cannot be imported.
    """
    import torch

    from ensemble.models import architectures
    from ensemble.strategies import BEST, HYBRIDS, best, find

    names = set(strategies)
    for hybrid in names & HYBRIDS.keys():
        names |= {HYBRIDS[hybrid].few, HYBRIDS[hybrid].many}
    names -= HYBRIDS.keys()
    if BEST in names:
        names.update(best.candidates(torch.device(device), torch.float32))
    if not architectures.is_torchvisions(arch):
        with contextlib.suppress(Exception):
            architectures.find(arch)
    for found in filter(None, map(find, names)):
        with contextlib.suppress(Exception):
            found.builder()


def _own_output() -> IO[str]:
    """Standard output for messages alone: whatever else prints there goes to standard error."""
    sys.stdout.flush()
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages
