"""The ranks as one group: every collective of the program, each of which may find a rank gone."""

from __future__ import annotations

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


class Group:
    """All ranks. Tensors move by the backend of the device, all else by gloo on the CPU.

    Every method is called by all ranks, in one order, and raises RankError where a rank has ended
    or takes longer than the timeout.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.device, self.backend = torch.device("cpu"), "gloo"
        self._tensors: dist.ProcessGroup | None = None  # the group of all else

    def use(self, device: torch.device, *, timeout_s: float) -> None:
        """From now on move tensors of this device, by its backend: gloo, nccl, xccl."""
        self.device, self.backend = device, dist.get_default_backend_for_device(device)
        if self.backend != "gloo":
            timeout = timedelta(seconds=timeout_s)
            with _found_broken():
                tensors = dist.new_group(backend=self.backend, timeout=timeout)
            assert isinstance(tensors, dist.ProcessGroup)  # all ranks are in it
            self._tensors = tensors

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values to all others, in place."""
        with _found_broken():
            dist.broadcast(_bytes(tensor), src=0, group=self._tensors)

    def scatter(self, part: Tensor, parts: Sequence[Tensor] | None) -> None:
        """Part r of rank 0 to rank r, into `part`; all parts are of its shape."""
        with _found_broken():
            given = [_bytes(part) for part in parts] if parts else None
            dist.scatter(_bytes(part), given, src=0, group=self._tensors)

    def gather(self, part: Tensor, parts: Sequence[Tensor] | None) -> None:
        """`part` of rank r into part r of rank 0; all parts are of its shape."""
        with _found_broken():
            taken = [_bytes(part) for part in parts] if parts else None
            dist.gather(_bytes(part), taken, dst=0, group=self._tensors)

    def add(self, tensor: Tensor) -> None:
        """The sum over the ranks, for all, in place."""
        with _found_broken():
            dist.all_reduce(tensor, group=self._tensors)

    def send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """All at once to one other rank, which takes them by `receive`."""
        with _found_broken():
            _wait([dist.isend(_bytes(tensor), rank, group=self._tensors) for tensor in tensors])

    def receive(self, tensors: Sequence[Tensor], rank: int) -> None:
        """All at once from one other rank, in place."""
        with _found_broken():
            _wait([dist.irecv(_bytes(tensor), rank, group=self._tensors) for tensor in tensors])

    def meet(self) -> None:
        """Wait until all ranks are here, and their devices idle."""
        synchronize(self.device)
        with _found_broken():
            dist.barrier()

    def tell(self, message: Any = None) -> Any:
        """Rank 0's message, for all."""
        box = [message]
        with _found_broken():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, part: Any) -> list[Any]:
        """What each rank has, by rank, for all."""
        every: list[Any] = [None] * self.ranks
        with _found_broken():
            dist.all_gather_object(every, part)
        return every


def join(*, timeout_s: float) -> Group:
    """Enter the group of all ranks of this start, as torchrun tells of them; tensors move by gloo.

    Raises:
        RankError: some rank did not come within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    with _found_broken():
        store, rank, ranks = next(iter(rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"resnet_vmap/{launch.attempt()}", store),
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
    return Group(rank, ranks)


def leave() -> None:
    """Close all connections: who still waits for this rank learns of it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None  # both ranks are in the group
        work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend moves, whatever the dtype."""
    return tensor.view(torch.uint8)


@contextmanager
def _found_broken() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no narrower one
        raise RankError(first_line(error)) from error
