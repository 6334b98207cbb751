"""Which models a rank holds, by values, for any number of models and ranks; cores likewise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.bench.executors.ranks import placement
from ensemble.bench.executors.ranks.placement import share_of
from ensemble.bench.executors.ranks.sharding import blocks, windows
from ensemble.errors import InputError
from ensemble.machine import cores
from ensemble.machine.cores import Cores
from tests.made import CONFIG, with_options


def test_five_models_over_two_ranks_are_three_and_two() -> None:
    assert blocks(5, 2) == (range(0, 3), range(3, 5))
    assert blocks(8, 2) == (range(0, 4), range(4, 8))
    assert blocks(7, 3) == (range(0, 3), range(3, 5), range(5, 7))
    assert windows(blocks(7, 3)) == (range(0, 3), range(3, 6), range(4, 7))


@settings(deadline=None)  # a busy machine is not an error
@given(ranks=st.integers(1, 1024), more=st.integers(0, 5000))
def test_every_model_is_held_once_in_order_as_evenly_as_can_be(ranks: int, more: int) -> None:
    num_models = ranks + more
    shards = blocks(num_models, ranks)
    assert [model for block in shards for model in block] == list(range(num_models))
    sizes = [len(block) for block in shards]
    assert len(shards) == ranks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    for block, window in zip(shards, windows(shards), strict=True):
        assert set(block) <= set(window) <= set(range(num_models))
        assert len(window) == sizes[0]


@settings(deadline=None)  # a busy machine is not an error
@given(ranks=st.integers(2, 100), lack=st.integers(1, 99))
def test_fewer_models_than_ranks_are_refused_with_both_numbers(ranks: int, lack: int) -> None:
    found = max(0, ranks - lack)
    with pytest.raises(InputError, match=f"expected at least {ranks}, .* found {found}"):
        blocks(found, ranks)


def test_the_ranks_of_a_host_have_cores_apart_or_one_each_where_there_are_too_few() -> None:
    four = (0, 2, 4, 6)
    assert [share_of(four, local_rank=rank, local_ranks=2) for rank in (0, 1)] == [(0, 2), (4, 6)]
    assert [share_of((3, 5), local_rank=rank, local_ranks=4) for rank in range(4)] == [
        (3,),
        (5,),
        (3,),
        (5,),
    ]


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (8.0, 4), (3.0, 2), (0.5, 1)])
def test_the_threads_of_a_rank_are_its_part_of_a_quota_of_cpu_time(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(placement, "_available_cores", lambda: tuple(range(8)))
    monkeypatch.setattr(cores, "detect", lambda: Cores(8, 8, quota))
    found = placement.find(
        with_options(CONFIG, device="cpu", threads=None).run, local_rank=1, local_ranks=2
    )
    assert (found.threads, found.cores) == (threads, (4, 5, 6, 7))
