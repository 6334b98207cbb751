"""Measure cases in fresh processes: start workers, read their messages, explain crashes."""

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
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import torch

import ensemble
from ensemble import files
from ensemble.bench import schedule
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors.executor import Execute, OnProgress, TaskOf
from ensemble.bench.measurement import FAILED, Measurement
from ensemble.bench.result_file import measurement_of
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, interrupt_behind
from ensemble.machine import memory
from ensemble.strategies import find

PACKAGE = Path(ensemble.__file__)
# The start of a worker: this package is imported from its own file, because `-m` and an entry of
# PYTHONPATH would also import `copy.py` or `ensemble.py` of the user's working folder. Its folder
# comes last, for processes that a worker starts in turn. Scripts for earlier versions look for the
# first line by `pgrep -f`.
START = """\
# a worker: ensemble.measure.worker
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
# Variables with the folders in which Inductor and Triton cache what they compile.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Job:
    """What all workers of a run share."""

    config: Config
    shared: str  # the file of models and images
    inherited: tuple[int, ...]  # its descriptor, where the file has no name
    device: str
    timeout_s: float
    shares_workers: bool  # see `schedule.shares_workers`
    caches: str | None  # the folder of what workers compile; None if they do not

    def batches(self, cases: Sequence[Case]) -> list[tuple[Case, ...]]:
        """The cases of each worker: one, or those of a grid point."""
        if not self.shares_workers:
            return [(case,) for case in cases]
        return [tuple(batch) for _, batch in groupby(cases, key=lambda case: case.grid_point)]

    def environment(self, cases: Sequence[Case]) -> dict[str, str]:
        """The environment of a worker of these cases. Caches on disk are empty at their first
        process, whose start is reported; the others read what it compiled. The user's own are
        kept."""
        if self.caches is None:
            return {**os.environ, "PYTHONUNBUFFERED": "1"}
        shared = cases[0].grid_point if self.shares_workers and cases else tuple(cases)
        folder = os.path.join(self.caches, f"{hash(shared):x}")
        own = {name: os.path.join(folder, name) for name in CACHES}
        return {**own, **os.environ, "PYTHONUNBUFFERED": "1"}


@contextmanager
def fresh_processes(config: Config, workload: Workload) -> Iterator[Execute]:
    """An executor that measures cases in fresh processes."""
    with jobs(schedule.of_one_process(config), workload) as job:
        yield partial(execute, job)


@contextmanager
def jobs(config: Config, workload: Workload) -> Iterator[Job]:
    """The job of a run: models and images in one file, which all workers map. On Linux it has no
    name: however this process ends, it is not left. Where workers compile, a temporary folder has
    what they do.

    Raises:
        InputError: there is no room for the file.
    """
    device, timeout_s = str(workload.device), 60 * config.measure.timeout_minutes
    shares_workers = schedule.shares_workers(config, device)
    size = workload.shared_bytes(config.models.image_size)
    with contextlib.ExitStack() as stack:
        try:
            if sys.platform == "linux":
                free = memory.available_bytes(torch.device("cpu")) or inf
                file = stack.enter_context(files.anonymous_file(size, free_memory=free))
                path, inherited = f"/proc/self/fd/{file.fileno()}", (file.fileno(),)
            else:
                folder = tempfile.TemporaryDirectory(prefix="resnet_vmap_")
                path, inherited = os.path.join(stack.enter_context(folder), "workload.pt"), ()
                file = stack.enter_context(open(path, "w+b"))
            caches = stack.enter_context(_caches()) if _compiles(config, device) else None
            workload.save_shared(file, config.models.image_size)
            file.flush()
            if config.load and config.load.load_log is None:  # a killed worker would leave them
                logs = stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet_vmap_"))
                config = replace(config, load=replace(config.load, load_log=logs))
        except (OSError, RuntimeError) as error:  # torch's writer makes the latter of the former
            with contextlib.suppress(OSError):  # it cannot be flushed either
                stack.close()
            if interrupt := interrupt_behind(error):
                raise interrupt from None
            raise InputError(
                f"{size / 1e6:,.0f} MB for the models and images of the workers cannot be written"
                f" to the temporary folder ({files.temporary_directory()}) or to memory:"
                f" {files.reason(error)}; set TMPDIR to a folder with room, or use --processes 0"
            ) from error
        yield Job(config, path, inherited, device, timeout_s, shares_workers, caches)


def _compiles(config: Config, device: str) -> bool:
    """Do workers compile by Inductor or Triton? `best` does so on an accelerator alone."""
    found = filter(None, map(find, config.run.strategies))
    return device != "cpu" or any(strategy.uses_inductor for strategy in found)


def _caches() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="resnet_vmap_", ignore_cleanup_errors=True)


class StartError(Exception):
    """A worker cannot be started: the system refuses a process, a thread or a file."""


class WorkerError(Exception):
    """A worker ended without an answer, or gave none in time; the text says how."""


class Worker:
    """A process that does one task, or measures several cases. However its use ends, it has ended
    too.

    Args:
        job: what all workers share.
        strategies: those that it is to measure, whose imports it does at once.
        cases: with them: see `Job.environment`.

    Raises:
        StartError: it cannot be started; nothing of it is left.
    """

    def __init__(self, job: Job, strategies: Sequence[str], cases: Sequence[Case] = ()) -> None:
        self._job, self._is_silent, self._was_awaited = job, False, False
        with contextlib.ExitStack() as opened:
            try:
                self._start(strategies, job.environment(cases), opened)
            except (OSError, RuntimeError) as error:  # of threading: can't start new thread
                message = f"the worker cannot be started: {files.reason(error)}"
                raise StartError(message) from error
            opened.pop_all()  # closed by __exit__

    def _start(
        self, strategies: Sequence[str], environment: dict[str, str], opened: contextlib.ExitStack
    ) -> None:
        """Start the process and the thread that reads from it; `opened` is given what to close."""
        self._errors = opened.enter_context(files.anonymous_file())
        where, parent = (str(PACKAGE.parents[1]), str(PACKAGE)), str(os.getpid())
        job, arch = self._job, self._job.config.models.arch
        # In a new session: Ctrl-C reaches only this process, which ends the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *where, parent, arch, *strategies, job.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            pass_fds=job.inherited,
            env=environment,
            start_new_session=True,
        )
        opened.enter_context(self._process)
        opened.callback(_kill, self._process)
        self._messages = _read(self._process)

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
        if self._was_awaited:
            return
        self._was_awaited = True
        try:
            first = self._messages.get(timeout=self._job.timeout_s)
        except queue.Empty:
            self._is_silent = True
            return
        if not first:
            self._messages.put(first)

    def measure(
        self, tasks: Sequence[Task], on_progress: OnProgress
    ) -> Generator[list[Measurement]]:
        """The measurement of each task in turn, and with the first that has such the reference's
        half of its pairs. It ends after one that fails.

        A worker that dies, or is silent for the job's `timeout_s`, is a failed measurement.
        """
        answers, case = self.answers({"tasks": [asdict(task) for task in tasks]}), tasks[0].case
        try:
            for message in answers:
                if "stage" in message:
                    on_progress(case, message["stage"], message.get("done", 0.0))
                    continue
                both = message["measurement"], message["reference"]
                yield [measurement_of(values) for values in both if values]
                tasks = tasks[1:]
                if not tasks or not message["continues"]:
                    return
                case = tasks[0].case
        except WorkerError as error:
            yield [Measurement(case, FAILED, str(error))]

    def answers(self, asked: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Send what is asked; the messages that the worker writes.

        Raises:
            WorkerError: it died, or was silent for the job's `timeout_s`.
        """
        if self._is_silent:
            raise self._timed_out()
        assert self._process.stdin is not None
        job = self._job
        content = {"config": job.config.plain(), "shared": job.shared, "device": job.device}
        with contextlib.suppress(BrokenPipeError):  # it has died: the reason is asked below
            self._process.stdin.write(json.dumps({**content, **asked}) + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._messages.get(timeout=job.timeout_s)
            except queue.Empty:
                raise self._timed_out() from None
            if not line:
                raise WorkerError(f"{_cause(self._process)}{self._last_line()}")
            yield json.loads(line)

    def _timed_out(self) -> WorkerError:
        _kill(self._process)
        return WorkerError(f"no answer in {self._job.timeout_s:.0f} s{self._last_line()}")

    def _last_line(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"; last line of stderr: {lines[-1]}" if lines else ""


def execute(
    job: Job, cases: Sequence[Case], task_of: TaskOf, on_progress: OnProgress
) -> Generator[Sequence[Measurement]]:
    """Measure each case in a separate worker; where the job shares workers, those of a grid point
    in one.

    All workers start together, because importing torch keeps one core busy for seconds. Then they
    wait, and measure one at a time: only then has one a context on the accelerator.
    """
    batches = job.batches(cases)
    with contextlib.ExitStack() as stack:
        workers = list[Worker | StartError]()
        for batch in batches:
            picked = [task.picked if (task := task_of(case)) else None for case in batch]
            names = [pick or case.strategy for pick, case in zip(picked, batch, strict=True)]
            workers.append(worker := _start(names, batch, job))
            if isinstance(worker, Worker):
                stack.enter_context(worker)
        on_progress(cases[0], "start", 0.0)
        for worker in workers:
            if isinstance(worker, Worker):
                worker.wait()
        for worker, batch in zip(workers, batches, strict=True):
            tasks = [task for case in batch if (task := task_of(case)) is not None]
            yield from _measured(job, worker, tasks, on_progress)


def _measured(
    job: Job, worker: Worker | StartError, tasks: Sequence[Task], on_progress: OnProgress
) -> Generator[list[Measurement]]:
    """The measurement of each task. Those that follow a failed one go to a fresh worker: what
    failed may have ended the process, or left its CUDA context in an error that every later call
    reports."""
    while True:
        if isinstance(worker, StartError):
            yield from ([Measurement(task.case, FAILED, str(worker))] for task in tasks)
            return
        with worker:
            worker.wait()
            for measurements in worker.measure(tasks, on_progress) if tasks else ():
                yield measurements
                tasks = tasks[1:]
        if not tasks:
            return
        names = [task.picked or task.case.strategy for task in tasks]
        worker = _start(names, [task.case for task in tasks], job)


def _start(strategies: Sequence[str], cases: Sequence[Case], job: Job) -> Worker | StartError:
    """A worker, or why it cannot be started."""
    try:
        return Worker(job, strategies, cases)
    except StartError as error:
        return error


def _read(process: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """The lines that a worker writes, as they come, and an empty one when it has ended."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed, because the worker timed out
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
    """Why a worker ended without a result."""
    _, status, usage = os.wait4(worker.pid, 0)
    worker.returncode = code = os.waitstatus_to_exitcode(status)
    held = 1024 * usage.ru_maxrss
    if code >= 0:
        return f"exited with code {code} without a result"
    name = signal.Signals(-code).name
    if -code != signal.SIGKILL:
        return f"killed by signal {-code} ({name})"
    total = memory.total_bytes()
    of = f" of {total / 1e9:.0f}" if total else ""
    return f"killed by signal {-code} (out of memory? {held / 1e9:.1f} GB{of} GB held at most)"
