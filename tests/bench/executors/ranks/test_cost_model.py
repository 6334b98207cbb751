"""The cost model of a call, against values by hand."""

from dataclasses import replace

import pytest

from ensemble.bench.executors.ranks.cost_model import Constants, call_cost, ranks_at_share

PLAIN = Constants(model_s=0.1, spread=0.0, step_s=0.001, part_s=0.0001, bytes_per_s=1e9)
IMAGE_S, LOGITS_S = 3 * 224 * 224 * 4 / 1e9, 4000 / 1e9


def test_a_call_is_the_largest_shard_a_broadcast_tree_and_a_gather_at_one_rank() -> None:
    found = call_cost(PLAIN, models=9, ranks=4)
    assert found.compute_s == pytest.approx(0.3)
    assert found.broadcast_s == pytest.approx(2 * (0.001 + IMAGE_S))
    assert found.gather_s == pytest.approx(0.001 + 2 * 0.0001 + 6 * LOGITS_S)
    assert found.waiting_s == 0
    assert found.whole_s == pytest.approx(0.3 + found.broadcast_s + found.gather_s)
    assert call_cost(PLAIN, models=9, ranks=1).whole_s == pytest.approx(0.9)


def test_the_straggler_overhead_is_the_expected_maximum_over_ranks() -> None:
    spread = replace(PLAIN, spread=0.1)
    waits = [call_cost(spread, models=ranks, ranks=ranks).waiting_s for ranks in (2, 16, 1024)]
    # E max of 2, 16 and 1,024 normal numbers: 0.56, 1.77 and 3.25 deviations, of a logarithm
    assert waits == pytest.approx([0.0058, 0.0189, 0.0382], rel=0.1)


def test_the_number_of_ranks_at_which_communication_takes_10_percent() -> None:
    found = ranks_at_share(PLAIN, share=0.1, models_per_rank=1)
    assert found is not None
    assert call_cost(PLAIN, models=found, ranks=found).communication_share >= 0.1
    assert call_cost(PLAIN, models=found - 1, ranks=found - 1).communication_share < 0.1
    free = Constants(model_s=1.0, spread=0.0, step_s=0.0, part_s=0.0, bytes_per_s=1e18)
    assert ranks_at_share(free, share=0.1, models_per_rank=1) is None
