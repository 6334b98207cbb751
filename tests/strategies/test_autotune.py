"""The autotuner of strategies, on a fake clock."""

import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from ensemble.errors import chained
from ensemble.strategies import autotune, chunked
from ensemble.strategies.autotune import AutotuneResult
from ensemble.strategies.build_result import BuildResult

EXAMPLE = torch.ones(1, 3, 4, 4)


class Machine:
    """A clock advanced by fake candidates, whose calls are slowed by `load(call)`."""

    def __init__(self, load: Callable[[int], float] = lambda call: 1.0) -> None:
        self.now, self.calls, self.load = 0.0, 0, load
        self.alive = weakref.WeakSet[Callable[[Tensor], Tensor]]()
        self.most_alive = 0

    def clock(self) -> float:
        return self.now

    def candidate(
        self, seconds: float, *, build_s: float = 0.0, label: float = 1.0
    ) -> Callable[[], BuildResult]:
        """A candidate whose call takes `seconds` and returns logits that are all `label`."""

        def make() -> BuildResult:
            def forward(x: Tensor) -> Tensor:
                self.now += seconds * self.load(self.calls)
                self.calls += 1
                return torch.full((2, 1, 5), label)

            self.now += build_s
            self.alive.add(forward)
            self.most_alive = max(self.most_alive, len(self.alive))
            return BuildResult(forward)

        return make

    def fastest(
        self,
        candidates: Mapping[str, Callable[[], BuildResult]],
        *,
        seconds: float = 60.0,
        **more: int,
    ) -> AutotuneResult:
        def check(logits: Tensor) -> None:
            if not bool((logits == 1).all()):
                raise ValueError("outputs disagree\nand more")

        return autotune.select_fastest(
            candidates, EXAMPLE, check=check, seconds=seconds, clock=self.clock, **more
        )


def broken() -> BuildResult:
    raise RuntimeError("no such device\nand more")


@pytest.fixture(autouse=True)
def real_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real durations of comparisons, which `no_settling` shortens for other tests."""
    monkeypatch.setattr(autotune, "MIN_SECONDS", 0.33)
    monkeypatch.setattr(autotune, "MAX_SECONDS", 1.0)


@pytest.mark.parametrize("order", [("slow", "fast"), ("fast", "slow")])
def test_five_percent_decide_in_either_order(order: tuple[str, ...]) -> None:
    machine = Machine()
    candidates = {"slow": machine.candidate(0.0525), "fast": machine.candidate(0.05)}
    found = machine.fastest({name: candidates[name] for name in order})
    assert found.name == "fast"
    assert found.times_s == pytest.approx({"slow": 0.0525, "fast": 0.05})


def test_times_of_candidates_are_comparable_though_the_machine_slows_down() -> None:
    machine = Machine(lambda call: 1.0 + call / 20)
    found = machine.fastest({"a": machine.candidate(0.05), "b": machine.candidate(0.02)})
    second = machine.fastest({"a": machine.candidate(0.05), "b": machine.candidate(0.02)})
    for each in (found, second):
        assert each.times_s["a"] / each.times_s["b"] == pytest.approx(2.5, rel=0.1)


def test_ties_keep_the_first_candidate() -> None:
    machine = Machine()
    found = machine.fastest({name: machine.candidate(0.05) for name in ("a", "b", "c")})
    assert found.name == "a"
    assert found.tried == "a 50 ms, b 50 ms, c 50 ms"


def test_drift_of_the_machine_does_not_decide() -> None:
    machine = Machine(lambda call: 1.0 + call / 20)
    candidates = {"slow": machine.candidate(0.055), "fast": machine.candidate(0.05)}
    assert machine.fastest(candidates).name == "fast"


def test_a_single_slow_call_does_not_decide() -> None:
    machine = Machine(lambda call: 3.0 if call % 7 == 0 else 1.0)
    candidates = {"slow": machine.candidate(0.055), "fast": machine.candidate(0.05)}
    assert machine.fastest(candidates).name == "fast"


def test_a_clear_loser_takes_two_rounds_and_a_close_one_a_second() -> None:
    clear, close = Machine(), Machine()
    clear.fastest({"fast": clear.candidate(0.05), "slow": clear.candidate(0.08)})
    assert (
        clear.calls == 2 + 2 * 2 * 2
    )  # one check each; two rounds of an untimed and a timed call each
    close.fastest({"fast": close.candidate(0.01), "slow": close.candidate(0.0101)})
    assert 1.0 < close.now < 1.2


@pytest.mark.parametrize("call_s", [1e-3, 0.016, 0.07])
def test_a_comparison_takes_about_a_third_of_a_second(call_s: float) -> None:
    machine = Machine()
    machine.fastest({"a": machine.candidate(call_s), "b": machine.candidate(1.2 * call_s)})
    assert machine.now < 0.33 + (2 * 2 * autotune.MIN_ROUNDS + 2) * 1.2 * call_s


def test_candidates_that_raise_or_disagree_are_rejected_with_their_error() -> None:
    machine = Machine()
    candidates = {"first": broken, "wrong": machine.candidate(0.01, label=2.0)}
    found = machine.fastest({**candidates, "third": machine.candidate(0.05), "last": broken})
    assert found.name == "third"
    assert found.tried == ("first: no such device; wrong: outputs disagree; last: no such device")


def test_if_all_candidates_raise_the_first_error_propagates() -> None:
    with pytest.raises(RuntimeError, match="no such device"):
        Machine().fastest({"first": broken, "second": Machine().candidate(0.1, label=0.0)})


def test_at_most_two_candidates_are_alive_and_finally_one() -> None:
    machine = Machine()
    times = (0.05, 0.04, 0.06, 0.03, 0.031)
    found = machine.fastest({str(seconds): machine.candidate(seconds) for seconds in times})
    assert found.name == "0.03"
    assert machine.most_alive == 2
    assert len(machine.alive) == 1


def test_after_the_autotuning_budget_candidates_are_skipped() -> None:
    machine = Machine()
    candidates = {name: machine.candidate(0.05, build_s=5.0) for name in ("a", "b", "c")}
    found = machine.fastest(candidates, seconds=8.0)
    assert list(found.build_s) == ["a", "b"]
    assert found.tried.endswith("; c: skipped: autotuning budget of 8 s exceeded (--tune_seconds)")


def test_with_too_little_memory_candidates_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "available_bytes", lambda device: 10**9)
    machine = Machine()
    candidates = {name: machine.candidate(0.05) for name in ("a", "b")}
    assert machine.fastest(candidates, bytes_each=10**9).errors == {}
    found = machine.fastest(candidates, bytes_each=2 * 10**9)
    assert found.tried == "b: skipped: may require 2.0 GB, 1.0 GB available"


def test_chunk_sizes_are_n_repeatedly_halved() -> None:
    assert [chunked.sizes(count) for count in (1, 2, 6)] == [[1], [2, 1], [6, 3, 2, 1]]


def test_a_rejected_candidate_keeps_no_frames_of_the_errors_behind_its_error() -> None:
    """Frames hold tensors: the memory that the next candidate needs."""

    def replaced() -> BuildResult:
        try:
            raise torch.OutOfMemoryError("no room")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("capture failed") from error

    found = Machine().fastest({"replaced": replaced, "right": Machine().candidate(0.05)})
    assert [one.__traceback__ for one in chained(found.errors["replaced"])] == [None, None]
