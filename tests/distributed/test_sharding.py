"""Which models a rank holds, by values, for any number of models and ranks; cores likewise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.distributed.placing import share_of
from ensemble.distributed.sharding import blocks, windows
from ensemble.errors import InputError


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
