"""The process group of all ranks, and every collective of the program."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ensemble.errors import RankError, first_line
from ensemble.machine import launch
from ensemble.machine.devices import synchronize

# After the timeout NCCL's watchdog ends the process, by default (3, SkipCleanUp): no finished row
# would be shown, and no rank named. CleanUpOnly (ErrorHandlingMode of torch's ProcessGroupNCCL.hpp)
# aborts the collective instead: the device becomes idle, and the barrier of the next step, which is
# gloo's, raises. Blocking waits would raise too, but the host would wait in every timed collective.
NCCL_ON_TIMEOUT, ABORT_COLLECTIVES = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"


class RankTimeoutError(RankError):
    """A collective failed after the timeout: a rank hangs, or is gone without a closed connection.

    Any other RankError means that a connection was closed: a rank has ended.
    """


class Group:
    """All ranks. Tensors move by the backend of the device, Python objects by gloo on the CPU.

    All ranks call every method, in the same order. It raises RankError if a rank has ended, and
    RankTimeoutError if it takes longer than `timeout_s`.
    """

    def __init__(self, rank: int, ranks: int, *, timeout_s: float) -> None:
        self.rank, self.ranks, self._timeout_s = rank, ranks, timeout_s
        self.device, self.backend = torch.device("cpu"), "gloo"
        self._tensor_group: dist.ProcessGroup | None = None  # None: the default group

    def use_device(self, device: torch.device) -> None:
        """From now on move tensors of this device, by its backend: gloo, nccl, xccl."""
        self.device, self.backend = device, dist.get_default_backend_for_device(device)
        if self.backend != "gloo":
            os.environ.setdefault(NCCL_ON_TIMEOUT, ABORT_COLLECTIVES)
            timeout = timedelta(seconds=self._timeout_s)
            with self._rank_errors():
                group = dist.new_group(backend=self.backend, timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
            self._tensor_group = group

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values to all others, in place."""
        with self._rank_errors():
            dist.broadcast(_as_bytes(tensor), src=0, group=self._tensor_group)

    def scatter(self, part: Tensor, parts: Sequence[Tensor] | None) -> None:
        """Part r of rank 0 to rank r, into `part`; all parts have its shape."""
        with self._rank_errors():
            sent = [_as_bytes(part) for part in parts] if parts else None
            dist.scatter(_as_bytes(part), sent, src=0, group=self._tensor_group)

    def gather(self, part: Tensor, parts: Sequence[Tensor] | None) -> None:
        """`part` of rank r into part r of rank 0; all parts have its shape."""
        with self._rank_errors():
            received = [_as_bytes(part) for part in parts] if parts else None
            dist.gather(_as_bytes(part), received, dst=0, group=self._tensor_group)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over the ranks, on all ranks, in place."""
        with self._rank_errors():
            dist.all_reduce(tensor, group=self._tensor_group)

    def send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Send all tensors at once to another rank, which calls `receive`."""
        with self._rank_errors():
            _wait(
                [
                    dist.isend(_as_bytes(tensor), rank, group=self._tensor_group)
                    for tensor in tensors
                ]
            )

    def receive(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Receive all tensors at once from another rank, in place."""
        with self._rank_errors():
            _wait(
                [
                    dist.irecv(_as_bytes(tensor), rank, group=self._tensor_group)
                    for tensor in tensors
                ]
            )

    def barrier(self) -> None:
        """Wait until all ranks are here, with idle devices."""
        synchronize(self.device)
        with self._rank_errors():
            dist.barrier()

    def broadcast_object(self, message: Any = None) -> Any:
        """Rank 0's message, on all ranks."""
        box = [message]
        with self._rank_errors():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, part: Any) -> list[Any]:
        """The parts of all ranks, in order of rank, on all ranks."""
        parts: list[Any] = [None] * self.ranks
        with self._rank_errors():
            dist.all_gather_object(parts, part)
        return parts

    @contextmanager
    def _rank_errors(self) -> Iterator[None]:
        with rank_errors(self._timeout_s):
            yield


def init_group(*, timeout_s: float) -> Group:
    """Join the group of all ranks of this torchrun; tensors move by gloo.

    Raises:
        RankError: a rank did not join within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    with rank_errors(timeout_s):
        store, rank, ranks = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"resnet_vmap/{launch.attempt()}", store),
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
    return Group(rank, ranks, timeout_s=timeout_s)


def destroy_group() -> None:
    """Close all connections, so that ranks that wait for this one detect its end."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank_errors(timeout_s: float) -> Iterator[None]:
    """Turn a failed collective into a RankError, after `timeout_s` into a RankTimeoutError.

    Backends raise one type for both, so that the elapsed time decides.
    """
    begin = time.monotonic()
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no narrower one
        is_timeout = time.monotonic() - begin >= timeout_s
        raise (RankTimeoutError if is_timeout else RankError)(first_line(error)) from error


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None  # both ranks are in the group
        work.wait()


def _as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor viewed as bytes, which every backend supports."""
    return tensor.view(torch.uint8)
