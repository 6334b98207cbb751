"""Ranks that differ from rank 0 are rejected by name, with the difference."""

from dataclasses import replace

import pytest
import torch

from ensemble.bench.executors.ranks import environment_check, sharded_backend
from ensemble.bench.executors.ranks.environment_check import RankInfo, shared_settings
from ensemble.bench.executors.ranks.rank_reports import RankReport
from ensemble.bench.measurement import Note
from ensemble.errors import InputError
from tests.made import CONFIG, with_options
from tests.tiny import tiny_models

CPU = torch.device("cpu")


def rank_info(host: str, **changes: object) -> RankInfo:
    (model,) = tiny_models(1)
    return RankInfo(host, 1, settings=shared_settings(CONFIG, CPU, "a.pth", model) | changes)


def test_equal_ranks_pass_whatever_their_host_and_the_outputs_of_rank_0() -> None:
    (model,) = tiny_models(1)
    other = with_options(CONFIG, export_json="a.json", image_path="elsewhere.jpg", verbose=True)
    second = RankInfo("host-b", 2, settings=shared_settings(other, CPU, "a.pth", model))
    environment_check.check([rank_info("host-a"), second])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, "rank 1 on host-b: expected torch 2.* like rank 0, got 1.0"),
        ({"device_name": "a GPU"}, "rank 1 on host-b: expected device_name .* got a GPU"),
        ({"--batch_size": (1, 2)}, "rank 1 on host-b: expected --batch_size 1 .* got 1 2"),
        ({"program": "abc+"}, "rank 1 on host-b: expected program .* got abc+"),
        ({"weights": "random"}, "expected weights a.pth like rank 0, got random"),
        ({"classes": 7}, "expected classes 5 like rank 0, got 7"),
    ],
)
def test_a_rank_that_differs_is_named_with_the_difference(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        environment_check.check([rank_info("host-a"), rank_info("host-b", **changes)])


def test_a_shared_checkpoint_must_be_the_same_on_every_rank() -> None:
    first, second = tiny_models(2)
    ranks = [
        RankInfo("host-a", 1, settings=shared_settings(CONFIG, CPU, "a.pth", model))
        for model in (first, second)
    ]
    with pytest.raises(InputError, match="rank 1 on host-a: expected checksum of the weights"):
        environment_check.check(ranks)


def test_an_error_of_one_rank_names_it_and_an_error_of_all_names_none() -> None:
    bad = replace(rank_info("host-b"), error="a.pth: broken")
    with pytest.raises(InputError, match=r"^rank 1 on host-b: a\.pth: broken$"):
        environment_check.check([rank_info("host-a"), bad])
    with pytest.raises(InputError, match=r"^a\.pth: broken$"):
        environment_check.check([bad, bad])


def test_two_ranks_with_one_gpu_are_rejected_before_nccl_is() -> None:
    infos = [replace(rank_info("host-a"), device_name="H100", device_id=id) for id in "aba"]
    message = r"rank 2 on host-a: expected a GPU for each rank, got that of rank 0 \(H100\)"
    with pytest.raises(InputError, match=message):
        environment_check.check(infos)
    environment_check.check(infos[:2])


def test_a_note_that_not_all_ranks_have_names_its_ranks() -> None:
    def of_rank(call_ms: int) -> RankReport:
        return RankReport(notes=(Note("folded"), Note("picked loop", f"loop {call_ms} ms")))

    found = sharded_backend._notes([of_rank(51), of_rank(52), of_rank(52)])
    assert tuple(map(str, found)) == (
        "folded",
        "rank 0: picked loop (loop 51 ms)",
        "ranks 1, 2: picked loop (loop 52 ms)",
    )
