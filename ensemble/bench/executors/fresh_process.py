"""Workers: start them, follow what they say, tell how one died. One at a time measures."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import torch

import ensemble
from ensemble import files
from ensemble.bench.config import Config
from ensemble.bench.records import Case, Result
from ensemble.bench.report.exports import result_of
from ensemble.bench.stages import Stage
from ensemble.bench.workload import Workload
from ensemble.errors import InputError
from ensemble.machine import memory

PACKAGE = Path(ensemble.__file__)
# The start of a worker: this package is imported from its own file, because `-m` and an entry of
# PYTHONPATH would also import `copy.py` or `ensemble.py` of the user's working folder. Its folder
# comes last, for processes that a worker starts in turn.
START = """\
import sys
from importlib.util import module_from_spec, spec_from_file_location
root, package = sys.argv[1:3]
del sys.argv[1:3]
if "ensemble" not in sys.modules:
    spec = spec_from_file_location("ensemble", package)
    sys.modules["ensemble"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ensemble"])
if root not in sys.path:
    sys.path.append(root)
from ensemble.bench.executors.worker import main; main()
"""
ROW = "ensemble.bench.measure"
# Workers that are started together. What they import differs, 1.8 to 2.8 s of one core: of two, one
# waited for the other with its core idle.
AT_ONCE = 3


@dataclass(frozen=True)
class Job:
    """What all workers of a run are told, beside their case."""

    config: Config
    shared: str  # the file of models and images
    inherited: tuple[int, ...]  # its descriptor, where the file has no name
    device: str
    timeout_s: float
    row: str  # the module whose `measure` makes a row of a case


@contextmanager
def jobs(config: Config, workload: Workload, *, row: str = ROW) -> Iterator[Job]:
    """The job of a run: models and images in one file, which all workers map. On Linux it has no
    name: however this process ends, nothing is left.

    Raises:
        InputError: there is no room for the file.
    """
    device, timeout_s = str(workload.device), 60 * config.timeout_minutes
    size = workload.shared_bytes(config.image_size)
    with contextlib.ExitStack() as stack:
        try:
            if sys.platform == "linux":
                free = memory.available_bytes(torch.device("cpu")) or inf
                file = stack.enter_context(files.nameless(size, free_memory=free))
                path, inherited = f"/proc/self/fd/{file.fileno()}", (file.fileno(),)
            else:
                folder = tempfile.TemporaryDirectory(prefix="resnet_vmap_")
                path, inherited = os.path.join(stack.enter_context(folder), "workload.pt"), ()
                file = stack.enter_context(open(path, "w+b"))
            workload.save_shared(file, config.image_size)
            file.flush()
            if config.scenario and config.load_log is None:  # a worker that is killed leaves them
                logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet_vmap_"))
                config = replace(config, load_log=logs)
        except (OSError, RuntimeError) as error:  # torch's writer makes the latter of the former
            with contextlib.suppress(OSError):  # what is left of it is not written either
                stack.close()
            raise InputError(
                f"{size / 1e6:,.0f} MB for the models and images of the workers cannot be written"
                f" to the temporary folder ({files.temporary_folder()}) or to memory:"
                f" {files.reason(error)}; set TMPDIR to a folder with room, or use --processes 0"
            ) from error
        yield Job(config, path, inherited, device, timeout_s, row)


class Worker:
    """A process that measures one case. However its use ends, it has ended too."""

    def __init__(self, job: Job, strategy: str) -> None:
        self._job = job
        self._errors = files.nameless()  # closed by __exit__
        where = str(PACKAGE.parents[1]), str(PACKAGE)
        # In a session of its own: Ctrl-C reaches this process alone, which ends it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *where, str(os.getpid()), strategy, job.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            pass_fds=job.inherited,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._messages = _read(self._process)
        self._is_silent = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):  # what was written is no longer read
                if stream is not None:
                    stream.close()

    def wait(self) -> None:
        """Until it has imported what it needs, or died: the first message; or for `timeout_s`."""
        try:
            first = self._messages.get(timeout=self._job.timeout_s)
        except queue.Empty:
            self._is_silent = True
            return
        if not first:
            self._messages.put(first)

    def measure(
        self, case: Case, *, number: int, picked: str | None, progress: Stage
    ) -> tuple[Result, Result | None]:
        """The row of a case, and the reference's half of its pairs where it has such.

        `number` is how many processes the row has had. It is added to the seed that arrivals under
        load are drawn from: rows of the same number meet the same arrivals.
        A worker that dies, or says nothing for the job's `timeout_s`, is a failed row.
        """
        if self._is_silent:
            return self._given_up(case), None
        assert self._process.stdin is not None
        config = replace(self._job.config, seed=self._job.config.seed + number)
        task: dict[str, Any] = {"config": config.plain(), "case": asdict(case)}
        task |= {"shared": self._job.shared, "device": self._job.device, "row": self._job.row}
        task |= {"number": number, "picked": picked}
        with contextlib.suppress(BrokenPipeError):  # it has died: the reason is asked below
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._messages.get(timeout=self._job.timeout_s)
            except queue.Empty:
                return self._given_up(case), None
            if not line:
                return self._failed(case, _cause(self._process)), None
            message = json.loads(line)
            if "row" in message:
                beside = message["reference"]
                return result_of(message["row"]), beside and result_of(beside)
            progress(message["stage"], message.get("done", 0.0))

    def _given_up(self, case: Case) -> Result:
        _kill(self._process)
        return self._failed(case, f"no answer in {self._job.timeout_s:.0f} s")

    def _failed(self, case: Case, cause: str) -> Result:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        last = f"; it said last: {said[-1]}" if said else ""
        return Result(case, status="failed", error=f"{cause}{last}")


def measure(
    job: Job,
    cases: Iterator[Case],
    *,
    picked: Callable[[Case], str | None],
    progress: Callable[[Case, str, float], None],
    number: Callable[[Case], int] = lambda case: 0,
    is_wanted: Callable[[Case], bool] = lambda case: True,
) -> Iterator[tuple[Result, Result | None]]:
    """Each case in a worker of its own, one after another; `number` of its processes so far.

    Several are started together, because importing torch keeps one core busy for seconds; they then
    wait, and measure one after the other. `picked` is asked what an earlier one chose for the case,
    `is_wanted` whether it still is, when its turn has come.
    """
    while together := tuple(islice(cases, AT_ONCE)):
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(job, picked(case) or case.strategy)) for case in together
            ]
            progress(together[0], "start", 0.0)
            for worker in workers:
                worker.wait()
            for worker, case in zip(workers, together, strict=True):
                with worker:
                    if is_wanted(case):
                        yield worker.measure(
                            case,
                            number=number(case),
                            picked=picked(case),
                            progress=partial(progress, case),
                        )


def _read(process: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """The lines that a worker says, as they come, and an empty one when it has ended."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed, because the worker was given up
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _kill(worker: subprocess.Popen[str]) -> None:
    """End a worker and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _cause(worker: subprocess.Popen[str]) -> str:
    """How a worker that said no row ended."""
    _, status, usage = os.wait4(worker.pid, 0)
    worker.returncode = code = os.waitstatus_to_exitcode(status)
    held = 1024 * usage.ru_maxrss
    if code >= 0:
        return f"ended with exit code {code} and no row"
    name = signal.Signals(-code).name
    if -code != signal.SIGKILL:
        return f"killed by signal {-code} ({name})"
    total = memory.total_bytes()
    of = f" of {total / 1e9:.0f}" if total else ""
    return f"killed by signal {-code} (out of memory? {held / 1e9:.1f} GB{of} GB held at most)"
