"""The communication of a call by NCCL: devices, shapes and dtypes under fake tensors."""

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ensemble.bench.executors.ranks import placement
from ensemble.bench.executors.ranks.exchange import Exchange
from ensemble.bench.executors.ranks.group import Group
from ensemble.bench.executors.ranks.sharding import shard_ranges
from ensemble.errors import InputError
from tests.made import CONFIG, with_options

RANKS, MODELS = 4, 6  # 2, 2, 1, 1


@pytest.fixture(params=range(RANKS))
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """One of four ranks, each on its own GPU, with collectives that move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    member = Group(request.param, RANKS, timeout_s=60.0)
    member.device = torch.device("cuda", 0)
    yield member
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_model", [False, True])
def test_inputs_and_logits_stay_on_the_gpu_in_their_dtype(
    group: Group, per_model: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    shards = shard_ranges(MODELS, RANKS)
    shape = torch.Size((MODELS, 2, 3, 8, 8) if per_model else (2, 3, 8, 8))
    count = len(shards[group.rank])
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(shape, dtype=dtype) if group.rank == 0 else None
        exchange = Exchange(group, shards, shape, dtype)
        part = exchange.distribute(x)
        assert part.shape == ((count, 2, 3, 8, 8) if per_model else (2, 3, 8, 8))
        logits = torch.empty(count, 2, 5, dtype=dtype)
        found, mean = (
            exchange.combine(logits, how, classes=logits.shape[2]) for how in ("none", "mean")
        )
    assert (part.device.type, part.dtype) == ("cuda", dtype)
    assert mean is not None
    assert (mean.device.type, mean.dtype, mean.shape) == ("cuda", torch.float32, (2, 5))
    if group.rank == 0:
        assert found is not None
        assert (found.device.type, found.dtype, found.shape) == ("cuda", dtype, (MODELS, 2, 5))
    else:
        assert found is None


def test_a_collective_of_nccl_that_times_out_does_not_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its watchdog aborts the collective alone: see `group.NCCL_ON_TIMEOUT`."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    seen: list[tuple[str, str]] = []

    def new_group(*, backend: str, timeout: timedelta) -> dist.ProcessGroup:
        assert timeout == timedelta(seconds=60)
        seen.append((backend, os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]))
        return dist.ProcessGroup(FakeStore(), 0, 1)

    monkeypatch.setattr(dist, "new_group", new_group)
    Group(0, 1, timeout_s=60.0).use_device(torch.device("cuda"))
    assert seen == [("nccl", "2")]


@pytest.mark.parametrize(("visible", "expected"), [(1, "cuda:0"), (4, "cuda:3"), (2, "cuda:3")])
def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_local_rank(
    visible: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where SLURM shows each task its own. With too few for all, the index is out of range."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    found = placement.resolve(with_options(CONFIG, device="cuda").run, local_rank=3, local_ranks=4)
    assert found.device == expected


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "cuda"):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda")
        )
        found = placement.resolve(
            with_options(CONFIG, device=name).run, local_rank=3, local_ranks=4
        )
        assert (found.device, found.cores) == ("cuda:3", None)
    with pytest.raises(InputError, match=r"expected cuda under torchrun: .* got cuda:1"):
        placement.resolve(with_options(CONFIG, device="cuda:1").run, local_rank=0, local_ranks=4)
