"""Calls from host memory to host memory: a server receives images there, and answers from there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.timed_calls import TimedCalls
from ensemble.strategies.build_result import ForwardFn


def pinned(x: Tensor) -> Tensor:
    """A copy in page-locked host memory of a tensor on CUDA: it copies to CUDA at the full rate,
    and asynchronously. Any other tensor is returned itself."""
    return x.cpu().pin_memory() if x.device.type == "cuda" else x


def from_host(forward: ForwardFn, device: torch.device) -> ForwardFn:
    """`forward` for inputs in host memory; its result is in host memory too, and complete."""

    def call(x: Tensor) -> Tensor:
        return forward(x.to(device, non_blocking=True)).cpu()

    return call


def calls_from_host(built: BuiltStrategy, example: Tensor) -> TimedCalls:
    """The calls of a strategy on CUDA, each from pinned host memory to a result on the host; on
    another device its plain calls.

    example: as for `TimedCalls`.
    """
    if example.device.type != "cuda":
        return TimedCalls(built, example)
    on_host = replace(
        built,
        example=pinned(built.example),
        timed_forward=from_host(built.timed_forward, example.device),
    )
    return TimedCalls(on_host, example.cpu())
