"""The inputs of timed calls, and what they leave behind."""

import pytest
import torch
from torch import Tensor

from ensemble.bench.build import BuiltStrategy
from ensemble.bench.inputs import vary
from ensemble.bench.timed_calls import TimedCalls, leak, remarks

MIB = 2**20


IMAGE = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def variant(number: int) -> Tensor:
    out = torch.empty_like(IMAGE)
    vary(IMAGE, number, out=out)
    return out


def calls_of(*answers: Tensor) -> tuple[TimedCalls, list[Tensor]]:
    """Calls of a strategy that gives these answers, or else its input; and its inputs."""
    given, inputs = iter(answers), list[Tensor]()

    def forward(x: Tensor) -> Tensor:
        inputs.append(x.clone())
        return next(given, inputs[-1])

    built = BuiltStrategy(forward, forward, IMAGE, IMAGE, 0.0, 0.0, None, ())
    return TimedCalls(built, IMAGE), inputs


def test_each_timed_call_has_a_new_input_and_the_others_the_one_before_it() -> None:
    calls, inputs = calls_of()
    calls.repeat()
    for _ in range(2):
        calls.renew()
        calls.repeat()
        calls()
    expected = [0, 0, 1, 1, 2]  # variants: 0 is the example
    for x, number in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x, variant(number), rtol=0, atol=0)
    assert calls.calls == 5


def test_a_result_is_forgotten_before_the_next_one_is_computed() -> None:
    """A strategy need not have the memory for two."""
    calls, _ = calls_of()
    calls()
    assert calls.result is not None
    calls.renew()
    assert calls.result is None


def test_a_result_repeats_if_it_is_the_answer_to_another_input() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    honest, _ = calls_of(one, other, other)
    cached, _ = calls_of(one, one, one)
    for calls, repeats in ((honest, False), (cached, True)):
        calls.repeat()
        calls.renew()
        calls()
        calls.repeat()  # the answer to its own input, once more
        assert calls.repeats is repeats


def test_memory_that_grows_with_the_calls_is_a_leak() -> None:
    used = [100 * MIB + 20 * MIB * call for call in (3, 6, 8, 12, 14)]
    assert leak(used, [3, 6, 8, 12, 14]) == pytest.approx(20 * MIB)


def test_memory_that_settles_or_fluctuates_is_none() -> None:
    calls = [2, 4, 6, 8, 10, 12]
    settled = [100 * MIB, 150 * MIB, 160 * MIB, 160 * MIB, 160 * MIB, 160 * MIB]
    assert leak(settled, calls) is None
    assert leak([(100 + 30 * (k % 2)) * MIB for k in range(6)], calls) is None
    assert leak([(100 * MIB + 4096 * k) for k in range(6)], calls) is None  # too little
    few = [100 * MIB + 600 * 1024 * k for k in range(6)]  # 0.3 MB a call, but below 4 MB in all
    assert leak(few, calls) is None
    assert leak([(100 * MIB - 20 * MIB * k) for k in range(6)], calls) is None
    assert leak([100 * MIB, 120 * MIB, 140 * MIB], [1, 2, 3]) is None  # too few rounds
    assert leak([None] * 6, calls) is None


def test_what_is_left_behind_has_figures() -> None:
    assert remarks(None, 0.1) == []
    assert remarks(20e6, 1.0) == [
        "memory grows by 20.0 MB per call",
        "keeps 1 core busy between calls",
    ]
    assert remarks(None, 1.94) == ["keeps 1.9 cores busy between calls"]
    assert remarks(None, 0.5) == ["keeps 0.5 cores busy between calls"]
