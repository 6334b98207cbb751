"""Ranks that differ are refused by name, with what differs."""

from dataclasses import replace

import pytest
import torch

from ensemble.bench.executors.ranks import backend, environment_check
from ensemble.bench.executors.ranks.environment_check import Facts
from ensemble.bench.executors.ranks.outcomes import Outcome
from ensemble.bench.measurement import Note
from ensemble.errors import InputError
from tests.made import CONFIG, with_options
from tests.tiny import tiny_models

CPU = torch.device("cpu")


def facts(host: str, **changes: object) -> Facts:
    (model,) = tiny_models(1)
    return Facts(host, 1, shared=environment_check.shared(CONFIG, CPU, "a.pth", model) | changes)


def test_ranks_that_are_alike_pass_whatever_their_host_and_what_rank_0_alone_writes() -> None:
    (model,) = tiny_models(1)
    other = with_options(CONFIG, export_json="a.json", image_path="elsewhere.jpg", verbose=True)
    second = Facts("host-b", 2, shared=environment_check.shared(other, CPU, "a.pth", model))
    environment_check.check([facts("host-a"), second])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, "rank 1 on host-b: expected torch 2.* like rank 0, found 1.0"),
        ({"device_name": "a GPU"}, "rank 1 on host-b: expected device_name .* found a GPU"),
        ({"--batch_size": (1, 2)}, "rank 1 on host-b: expected --batch_size 1 .* found 1 2"),
        ({"program": "abc+"}, "rank 1 on host-b: expected program .* found abc+"),
        ({"weights": "random"}, "expected weights a.pth like rank 0, found random"),
        ({"classes": 7}, "expected classes 5 like rank 0, found 7"),
    ],
)
def test_one_that_differs_is_named_with_what_differs(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        environment_check.check([facts("host-a"), facts("host-b", **changes)])


def test_a_file_that_every_rank_reads_must_be_the_same_file() -> None:
    first, second = tiny_models(2)
    ranks = [
        Facts("host-a", 1, shared=environment_check.shared(CONFIG, CPU, "a.pth", model))
        for model in (first, second)
    ]
    with pytest.raises(InputError, match="rank 1 on host-a: expected checksum of the weights"):
        environment_check.check(ranks)


def test_what_is_wrong_on_one_rank_names_it_and_what_is_wrong_on_all_names_none() -> None:
    bad = replace(facts("host-b"), error="a.pth: broken")
    with pytest.raises(InputError, match=r"^rank 1 on host-b: a\.pth: broken$"):
        environment_check.check([facts("host-a"), bad])
    with pytest.raises(InputError, match=r"^a\.pth: broken$"):
        environment_check.check([bad, bad])


def test_a_note_that_not_all_ranks_have_says_whose_it_is() -> None:
    def of_rank(call_ms: int) -> Outcome:
        return Outcome(notes=(Note("folded"), Note("picked loop", f"loop {call_ms} ms")))

    found = backend._notes([of_rank(51), of_rank(52), of_rank(52)])
    assert tuple(map(str, found)) == (
        "folded",
        "rank 0: picked loop (loop 51 ms)",
        "ranks 1, 2: picked loop (loop 52 ms)",
    )
