"""Several models at once: one a core on the CPU, one a stream on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import channels_last, folded, private
from ensemble.machine.per_process import PerProcess
from ensemble.strategies.build_result import Built, PerModel, Run
from ensemble.strategies.compiled import compiled_models

# More streams than this do not help: each kernel of a ResNet wants a good part of the device.
MAX_STREAMS = 16

T = TypeVar("T")
_SETTING = PerProcess(Lock)

One = Callable[[Tensor], object]  # a model: channels-last images (B, 3, H, W) -> logits


def eager(models: Sequence[nn.Module], example: Tensor) -> Built:
    """Folded models, eager, concurrently."""
    return side_by_side([_on_a_copy(model) for model in folded(models, example)], example)


def compiled(models: Sequence[nn.Module], example: Tensor) -> Built:
    """Folded models through one compiled forward, concurrently."""
    forwards = compiled_models(folded(models, example))
    return side_by_side([_on_a_copy(forward) for forward in forwards], example)


def _on_a_copy(model: One) -> One:
    """A model that may write to its input, which others read at the same time."""
    return lambda x: model(private(x))


def shares(num_models: int, cores: int) -> list[tuple[list[int], int]]:
    """Which models run side by side: (indices of a worker's models, threads of the worker).

    One thread a worker while there are models for every core; what is left over by then, and an
    ensemble smaller than the cores, would leave cores idle and is spread over more threads each.
    """
    whole = num_models // cores * cores
    plan = [(list(range(core, whole, cores)), 1) for core in range(cores) if core < whole]
    left = num_models - whole
    return plan + [([whole + index], max(1, cores // left)) for index in range(left)]


def side_by_side(models: Sequence[One], example: Tensor) -> Built:
    """A forward that runs all models on channels-last images, several at once.

    models: none writes to what it is given.
    """
    if example.device.type == "cpu":
        return Built(_over_cores(models, example))
    return Built(_over_streams(models, example))


def _over_cores(models: Sequence[One], example: Tensor) -> Run:
    cores, per_model = torch.get_num_threads(), example.dim() == 5
    plan = shares(len(models), cores)
    widths = sorted({threads for _, threads in plan})
    pools = PerProcess(lambda: {threads: _pool(cores // threads, threads) for threads in widths})
    pools()  # now, and not in the first call: threads take long to start

    def work(indices: list[int], x: Tensor) -> list[object]:
        with torch.inference_mode():  # a thread starts without its caller's mode
            return [models[index](x[index] if per_model else x) for index in indices]

    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        logits: dict[int, object] = {}
        for threads in widths:  # the leftover models after the whole rounds, not among them
            parts = [indices for indices, width in plan if width == threads]
            done = pools()[threads].map(lambda indices: work(indices, x), parts)
            for indices, outputs in zip(parts, done, strict=True):
                logits |= dict(zip(indices, outputs, strict=True))
        return PerModel([logits[index] for index in range(len(models))])

    return forward


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Running workers that compute on so many threads each; no other thread's setting changes.

    torch keeps a number for each thread, and one that threads to come begin with: setting the
    first sets the second as well. So that one is put back, and nobody else may start a pool then.
    """
    with _SETTING():
        for_new_threads = _in_new_thread(torch.get_num_threads)
        started = Barrier(workers)

        def start() -> None:
            started.wait()  # each worker takes one: none is left to start in a call
            torch.get_num_threads()  # a thread takes what it begins with here, or later: over ours
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
            _in_new_thread(lambda: torch.set_num_threads(for_new_threads))
    return pool


def _in_new_thread(function: Callable[[], T]) -> T:
    """What `function` gives in a thread that has no settings of its own yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _over_streams(models: Sequence[One], example: Tensor) -> Run:
    per_model = example.dim() == 5
    streams = [torch.Stream(example.device) for _ in range(min(len(models), MAX_STREAMS))]

    def forward(x: Tensor) -> PerModel:
        x = channels_last(x)
        caller, logits = torch.accelerator.current_stream(x.device), list[object]()
        for stream in streams:
            stream.wait_stream(caller)
        for index in range(len(models)):
            with streams[index % len(streams)] as stream:
                logits.append(models[index](x[index] if per_model else x))
                x.record_stream(stream)
        for stream in streams:
            caller.wait_stream(stream)
        for tensor in logits:
            if isinstance(tensor, Tensor):
                tensor.record_stream(caller)
        return PerModel(logits)

    return forward
