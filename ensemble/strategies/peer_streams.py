"""Runtimes on CUDA that read and write memory of torch on streams of torch, and their order.

No call waits on the host: events order the work of a call after that of the stream which is current
at the call, and before what that stream does next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ensemble.machine import cuda_graphs
from ensemble.strategies.peer_autotune import RunModels

TUNING_MODELS = 8  # each setting builds its own sessions, and a session takes about a second

Enqueue = Callable[[], None]  # queue one forward of one model on its stream
# index of a model, its input, its output and its stream -> Enqueue
Bind = Callable[[int, Tensor, Tensor, torch.cuda.Stream], Enqueue]


def tuning_size(num_models: int) -> int:
    """The number of models to tune with."""
    return min(num_models, TUNING_MODELS)


def on_streams(
    bind: Bind,
    example: Tensor,
    output: Tensor,
    num_models: int,
    *,
    max_streams: int,
    capture: bool = False,
) -> RunModels:
    """Run models on up to `max_streams` streams, from and into memory that lives as long as they.

    Args:
        bind: binds a model to its memory and its stream.
        example: `(B, ...)`, read by all models, or `(N, B, ...)`.
        output: like the output of each model.
        capture: replay the launches as one CUDA graph.
    """
    device = example.device
    streams = [torch.cuda.Stream(device) for _ in range(min(num_models, max_streams))]
    # A batch for each model is memory of its own: slices of one tensor may not be aligned.
    per_model = example.dim() == 5
    batches = [_like(x) for x in (example[:num_models] if per_model else [example])]
    inputs = batches if per_model else batches * num_models
    outputs = [_like(output) for _ in range(num_models)]
    forwards = [
        bind(index, x, logits, streams[index % len(streams)])
        for index, (x, logits) in enumerate(zip(inputs, outputs, strict=True))
    ]
    launch: Callable[[], None] = partial(_fork_and_join, forwards, streams, device)
    if capture:
        launch = _captured(launch, device)

    def run(given: list[Tensor]) -> list[Tensor]:
        for target, batch in zip(batches, given, strict=False):  # a shared batch is copied once
            target.copy_(batch)
        launch()
        return outputs

    return ordered(run, device)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def ordered(run: RunModels, device: torch.device) -> RunModels:
    """`run` with copies of its outputs, on the device, ordered after the call before.

    The call before may have run on another stream, and the outputs lie in memory that a call
    reuses, so each waits for the copies of the last.
    """
    copied = torch.cuda.Event()

    def call(batches: list[Tensor]) -> list[Tensor]:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(copied)
            outputs = list(torch.stack(run(batches)))
            copied.record(stream)
        return outputs

    return call


def _fork_and_join(
    forwards: list[Enqueue], streams: list[torch.cuda.Stream], device: torch.device
) -> None:
    caller = torch.cuda.current_stream(device)
    for stream in streams:
        stream.wait_stream(caller)
    for forward in forwards:
        forward()
    for stream in streams:
        caller.wait_stream(stream)


def _captured(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`launch` as one CUDA graph, which reads and writes the same memory."""
    launch()  # on the caller's stream: lazy initialization must not be captured
    graph, _ = cuda_graphs.capture(launch, device, warmup=0)

    def replay(_keep: Callable[[], None] = launch) -> None:  # it holds what the graph runs
        graph.replay()

    return replay
