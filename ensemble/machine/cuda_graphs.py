"""Capture of CUDA graphs that share no memory with each other, and their replay."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ensemble.machine.per_process import PerProcess

T = TypeVar("T")

_CAPTURING = PerProcess(threading.Lock)  # torch supports one capture at a time per process


@dataclass(frozen=True)
class GraphedFunction:
    """A function of one tensor as a CUDA graph; calls share its static input and output.

    Not reentrant: threads must take turns. Calls on several streams may follow each other: each
    waits on the device until the one before has copied its result.
    """

    graph: torch.cuda.CUDAGraph
    x: Tensor
    result: Tensor
    copied: torch.cuda.Event  # recorded after the result of the latest call was copied
    keeps_alive: object  # what owns the tensors that the graph reads

    def __call__(self, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream(self.x.device)
        stream.wait_event(self.copied)
        self.x.copy_(x)
        self.graph.replay()
        result = self.result.clone()
        self.copied.record(stream)
        return result


def graphed(
    function: Callable[[Tensor], Tensor], example: Tensor, *, warmup: int
) -> GraphedFunction:
    """`function` as a CUDA graph, for inputs like the example on a CUDA device.

    warmup: calls before the capture, which must not capture lazy initialization.

    Raises:
        Exception: see `capture`.
    """
    x = example.clone()
    graph, result = capture(lambda: function(x), x.device, warmup=warmup)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))
    return GraphedFunction(graph, x, result, copied, function)


def capture(
    record: Callable[[], T], device: torch.device, *, warmup: int
) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of the kernels that `record` launches, and its result.

    It is captured on a stream and in a memory pool of its own, and with cuBLAS workspaces in that
    pool: dropping another graph frees nothing that this one reads.

    Raises:
        Exception: the first error, of `record`: the capture that it invalidates raises another. The
            capture has ended, and the caller's stream is the current one.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)
    failure: Exception | None = None
    # `torch.cuda.graph` leaves its stream current if it fails to end the capture.
    with _CAPTURING(), torch.cuda.stream(torch.cuda.current_stream(device)):
        torch.cuda.synchronize(device)  # the example and the weights are complete
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                record()
        try:
            with (
                _own_cublas_workspaces(),
                torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    result = record()
                except Exception as error:
                    failure = error
                    raise
            return graph, result
        except BaseException:
            _release_pool(device, pool)
            if failure is None:
                raise
    raise failure  # outside of the handler, which would replace the context of the error


@contextlib.contextmanager
def _own_cublas_workspaces() -> Iterator[None]:
    """A context for a capture, which then allocates its cuBLAS workspaces in its own pool.

    cuBLAS has one workspace per stream. By default torch captures all graphs on one stream, so
    later graphs compute in the workspace that lies in the pool of the first, and the reset of any
    of them frees it (pytorch#175276, pytorch#193402). A stream per graph alone does not help: torch
    hands out 32 streams in turn. Cleared before the capture, a graph allocates its own; cleared
    after it, eager calls on that stream do not compute in the graph's. What live graphs use stays
    mapped, as they keep their pools.

    Source: `clear_cublas_manager` of torch/_inductor/cudagraph_trees.py.
    """
    _clear_cublas_workspaces()
    try:
        yield
    finally:
        _clear_cublas_workspaces()


def _clear_cublas_workspaces() -> None:
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


def _release_pool(device: torch.device, pool: Any) -> None:
    """Release the pool of a failed capture.

    If `CUDAGraph.capture_end` raises because the capture was invalidated, the allocator regards it
    as under way: it keeps the pool, and no longer empties its cache. Source: CUDAGraph.cpp.
    """
    if not hasattr(torch._C, "_cuda_endAllocateToPool"):
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # the capture has ended properly: its graph releases it
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
