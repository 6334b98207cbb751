"""Several models at once: one per core on the CPU, one per stream on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import channels_last, private
from ensemble.machine.devices import MAX_STREAMS
from ensemble.machine.per_process import PerProcess
from ensemble.strategies.build_result import BuildResult, PerModel, RawForward
from ensemble.strategies.compiled import compiled_models
from ensemble.strategies.folded import folded_models, saved_as, serving_of
from ensemble.strategies.saved_run import CONCURRENT

T = TypeVar("T")
_THREAD_COUNT_LOCK = PerProcess(Lock)

Model = Callable[[Tensor], object]  # channels-last images (B, 3, H, W) -> logits


def eager(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """Folded models, eager, concurrently."""
    copies = folded_models(models, example)
    run = concurrent_forward([_with_private_input(model) for model in copies], example)
    return BuildResult(run, serving=serving_of(copies, saved=saved_as(copies, CONCURRENT)))


def compiled(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """Folded models through one compiled forward, concurrently."""
    copies = folded_models(models, example)

    def plan(_: nn.Module | None, x: Tensor) -> RawForward:
        forwards = compiled_models(copies)
        return concurrent_forward([_with_private_input(forward) for forward in forwards], x)

    serving = serving_of(copies, plan=plan, plans_in_seconds=True)
    return BuildResult(plan(copies[0], example), serving=serving)


def _with_private_input(model: Model) -> Model:
    """`model` called with a copy of x: it may write to its input, which other models share."""
    return lambda x: model(private(x))


def partition(num_models: int, cores: int) -> list[tuple[list[int], int]]:
    """Assign models to workers: (indices of the worker's models, threads of the worker).

    Single-threaded workers, one per core, share the largest multiple of `cores` models. Each
    remaining model gets its own worker, with the cores divided among these.
    """
    whole = num_models // cores * cores
    plan = [(list(range(core, whole, cores)), 1) for core in range(cores) if core < whole]
    remaining = num_models - whole
    return plan + [([whole + index], max(1, cores // remaining)) for index in range(remaining)]


def concurrent_forward(models: Sequence[Model], example: Tensor) -> RawForward:
    """A forward that runs all models on channels-last images of any shape, several at once.

    models: must not write to their input. A call reads each once.
    """
    if example.device.type == "cpu":
        return _over_cores(models)
    return _over_streams(models, example.device)


def _over_cores(models: Sequence[Model]) -> RawForward:
    cores = torch.get_num_threads()
    plan = partition(len(models), cores)
    widths = sorted({threads for _, threads in plan})
    pools = PerProcess(lambda: {threads: _pool(cores // threads, threads) for threads in widths})
    pools()  # start the threads at build, not in the first call

    def work(indices: list[int], x: Tensor) -> list[object]:
        with torch.inference_mode():  # thread-local: not inherited from the caller
            return [models[index](x[index] if x.dim() == 5 else x) for index in indices]

    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        logits: dict[int, object] = {}
        for threads in widths:  # the single-threaded workers finish before the remaining models
            parts = [indices for indices, width in plan if width == threads]
            done = pools()[threads].map(lambda indices: work(indices, x), parts)
            for indices, outputs in zip(parts, done, strict=True):
                logits |= dict(zip(indices, outputs, strict=True))
        return PerModel([logits[index] for index in range(len(models))])

    return forward


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """A pool of started workers that run torch on `threads` threads each, without side effects on
    the thread count of other threads.

    torch has a thread count per thread and a default for new threads, and `set_num_threads` sets
    both. So the default is restored, under a lock.
    """
    with _THREAD_COUNT_LOCK():
        default = _in_new_thread(torch.get_num_threads)
        started = Barrier(workers)

        def start() -> None:
            started.wait()  # one task per worker: all threads are started before any call
            torch.get_num_threads()  # initializes the count lazily; later it would overwrite ours
            torch.set_num_threads(threads)

        pool = ThreadPoolExecutor(workers, thread_name_prefix="ensemble")
        try:
            for future in [pool.submit(start) for _ in range(workers)]:
                future.result()
        except BaseException:
            started.abort()
            pool.shutdown(wait=False)
            raise
        finally:
            _in_new_thread(lambda: torch.set_num_threads(default))
    return pool


def _in_new_thread(function: Callable[[], T]) -> T:
    """The result of `function` in a new thread, which has the default settings."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _over_streams(models: Sequence[Model], device: torch.device) -> RawForward:
    streams = [torch.Stream(device) for _ in range(min(len(models), MAX_STREAMS))]

    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        caller, logits = torch.accelerator.current_stream(x.device), list[object]()
        for stream in streams:
            stream.wait_stream(caller)
        for index in range(len(models)):
            with streams[index % len(streams)] as stream:
                logits.append(models[index](x[index] if x.dim() == 5 else x))
                x.record_stream(stream)
        for stream in streams:
            caller.wait_stream(stream)
        for tensor in logits:
            if isinstance(tensor, Tensor):
                tensor.record_stream(caller)
        return PerModel(logits)

    return forward
