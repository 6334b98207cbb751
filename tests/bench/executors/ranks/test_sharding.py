"""The shards of models, and the cores and threads of ranks, by value."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.bench.executors.ranks import placement
from ensemble.bench.executors.ranks.placement import cores_of_rank
from ensemble.bench.executors.ranks.sharding import equal_ranges, shard_ranges
from ensemble.errors import InputError
from ensemble.machine import cores
from ensemble.machine.cores import Cores
from tests.made import CONFIG, with_options


def test_five_models_over_two_ranks_are_three_and_two() -> None:
    assert shard_ranges(5, 2) == (range(0, 3), range(3, 5))
    assert shard_ranges(8, 2) == (range(0, 4), range(4, 8))
    assert shard_ranges(7, 3) == (range(0, 3), range(3, 5), range(5, 7))
    assert equal_ranges(shard_ranges(7, 3)) == (range(0, 3), range(3, 6), range(4, 7))


@settings(deadline=None)  # a busy machine is not an error
@given(ranks=st.integers(1, 1024), more=st.integers(0, 5000))
def test_shards_partition_the_models_and_differ_by_at_most_one(ranks: int, more: int) -> None:
    num_models = ranks + more
    shards = shard_ranges(num_models, ranks)
    assert [model for shard in shards for model in shard] == list(range(num_models))
    sizes = [len(shard) for shard in shards]
    assert len(shards) == ranks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    for shard, extended in zip(shards, equal_ranges(shards), strict=True):
        assert set(shard) <= set(extended) <= set(range(num_models))
        assert len(extended) == sizes[0]


@settings(deadline=None)  # a busy machine is not an error
@given(ranks=st.integers(2, 100), lack=st.integers(1, 99))
def test_fewer_models_than_ranks_are_rejected_with_both_numbers(ranks: int, lack: int) -> None:
    found = max(0, ranks - lack)
    with pytest.raises(InputError, match=f"expected at least {ranks}, .* got {found}"):
        shard_ranges(found, ranks)


def test_the_ranks_of_a_host_have_disjoint_cores_or_share_one_each() -> None:
    four = (0, 2, 4, 6)
    assert [cores_of_rank(four, local_rank=rank, local_ranks=2) for rank in (0, 1)] == [
        (0, 2),
        (4, 6),
    ]
    assert [cores_of_rank((3, 5), local_rank=rank, local_ranks=4) for rank in range(4)] == [
        (3,),
        (5,),
        (3,),
        (5,),
    ]


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (8.0, 4), (3.0, 2), (0.5, 1)])
def test_the_threads_of_a_rank_are_its_part_of_a_cpu_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(placement, "_available_cores", lambda: tuple(range(8)))
    monkeypatch.setattr(cores, "detect", lambda: Cores(8, 8, quota))
    found = placement.resolve(
        with_options(CONFIG, device="cpu", threads=None).run, local_rank=1, local_ranks=2
    )
    assert (found.threads, found.cores) == (threads, (4, 5, 6, 7))
