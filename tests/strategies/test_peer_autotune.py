"""The autotuner of another runtime's settings, on a fake clock."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ensemble.strategies import peer_autotune
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.peer_autotune import RunModels
from ensemble.strategies.stacked_outputs import stack_outputs

EXAMPLE = torch.ones(1, 3, 4, 4)


class Machine:
    """A clock advanced by fake settings, whose calls are slowed by `load(call)`, and by sleeps."""

    def __init__(self, load: Callable[[int], float] = lambda call: 1.0) -> None:
        self.now, self.calls, self.load = 0.0, 0, load

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def setting(self, seconds: float, label: float = 0.0) -> Callable[[int], RunModels]:
        """A setting whose call takes `seconds` and returns the logit `label` per model."""

        def make(count: int) -> RunModels:
            def run(batches: list[Tensor]) -> list[Tensor]:
                assert len(batches) == count
                self.now += seconds * self.load(self.calls)
                self.calls += 1
                return [batch[:, 0, 0, :1] * label for batch in batches]

            return run

        return make

    def fastest(
        self,
        settings: dict[str, Callable[[int], RunModels]],
        num_models: int = 2,
        tuning_models: int | None = None,
    ) -> BuildResult:
        return peer_autotune.select_fastest(
            settings,
            EXAMPLE,
            num_models,
            tuning_models=tuning_models or num_models,
            clock=self.clock,
            sleep=self.sleep,
        )


def broken(count: int) -> RunModels:
    raise RuntimeError("no such device\nand more")


@pytest.mark.parametrize("order", [("slow", "fast"), ("fast", "slow")])
def test_three_percent_decide_in_either_order(
    order: tuple[str, ...],
) -> None:
    machine = Machine()
    settings = {"slow": machine.setting(0.0515), "fast": machine.setting(0.0500)}
    found = machine.fastest({name: settings[name] for name in order})
    assert found.note == "setting: fast"
    assert found.details.startswith("tried with 2 models: ")


def test_a_busy_machine_while_timing_one_setting_does_not_decide() -> None:
    def load(call: int) -> float:  # the first setting is slowed by 6 % at first
        return 1.06 if call < 9 else 1.0

    machine = Machine(load)
    found = machine.fastest({"fast": machine.setting(0.0500), "slow": machine.setting(0.0515)})
    assert found.note == "setting: fast"


def test_single_slow_calls_do_not_decide() -> None:
    machine = Machine(lambda call: 3.0 if call % 5 == 0 else 1.0)
    found = machine.fastest({"slow": machine.setting(0.0515), "fast": machine.setting(0.0500)})
    assert found.note == "setting: fast"


def test_clearly_different_settings_are_not_timed_again() -> None:
    machine = Machine()
    machine.fastest({"fast": machine.setting(0.05), "slow": machine.setting(0.08)})
    assert machine.calls == 2 * (1 + peer_autotune.SHORT.max_rounds)


@pytest.mark.parametrize("call_s", [1e-4, 0.016, 0.07, 1.0])
def test_tuning_takes_seconds_for_any_time_per_call(call_s: float) -> None:
    machine = Machine()
    machine.fastest({name: machine.setting(call_s) for name in ("a", "b", "c")})
    calls = 3 * (
        2 * (peer_autotune.SHORT.min_rounds + peer_autotune.LONG.min_rounds) + 2
    )  # even if each call is slow
    rests = 3 * (1 + peer_autotune.LONG.max_rounds) * peer_autotune.REST_S
    limits = 3 * peer_autotune.SHORT.limit_s + peer_autotune.LONG.limit_s
    assert machine.now < limits + rests + calls * call_s


def test_a_setting_that_raises_is_rejected_with_its_error() -> None:
    machine = Machine()
    found = machine.fastest({"first": broken, "second": machine.setting(0.05, label=7.0)})
    assert found.note == "setting: second"
    assert found.details == "tried with 2 models: second 50 ms; first: no such device"
    assert stack_outputs(found.forward(EXAMPLE), 2).tolist() == [[[7.0]], [[7.0]]]


def test_a_setting_whose_call_raises_is_rejected() -> None:
    def make(count: int) -> RunModels:
        def run(batches: list[Tensor]) -> list[Tensor]:
            raise MemoryError

        return run

    machine = Machine()
    found = machine.fastest({"first": make, "second": machine.setting(0.05)})
    assert found.details.endswith("second 50 ms; first: MemoryError")


def test_if_all_settings_raise_the_first_error_propagates() -> None:
    def other(count: int) -> RunModels:
        raise ValueError("another")

    with pytest.raises(RuntimeError, match="no such device"):
        Machine().fastest({"first": broken, "second": other})


def test_if_two_settings_exceed_the_memory_the_isolated_times_decide() -> None:
    machine, alive = Machine(), weakref.WeakSet[RunModels]()

    def scarce(seconds: float) -> Callable[[int], RunModels]:
        def make(count: int) -> RunModels:
            if alive:
                raise MemoryError("no room")
            alive.add(run := machine.setting(seconds)(count))
            return run

        return make

    found = machine.fastest({"slow": scarce(0.0515), "fast": scarce(0.05)})
    assert found.note == "setting: fast"
    assert found.details.endswith("; interleaved timing: no room")


def test_the_selected_setting_is_built_for_all_models() -> None:
    machine = Machine()
    found = machine.fastest(
        {"only": machine.setting(0.05, label=2.0)}, num_models=5, tuning_models=3
    )
    assert stack_outputs(found.forward(EXAMPLE), 5).shape == (5, 1, 1)
    assert "tried with 3 models" in found.details


def test_losing_settings_are_released() -> None:
    machine, alive = Machine(), weakref.WeakSet[RunModels]()

    def noted(seconds: float) -> Callable[[int], RunModels]:
        def make(count: int) -> RunModels:
            alive.add(run := machine.setting(seconds)(count))
            return run

        return make

    found = machine.fastest({"fast": noted(0.05), "slow": noted(0.051), "slowest": noted(0.09)})
    assert len(alive) == 1
    assert stack_outputs(found.forward(EXAMPLE), 2).shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("num_models", "cores", "tuned"), [(1, 2, 1), (8, 2, 8), (16, 2, 8), (17, 2, 9), (5, 64, 5)]
)
def test_tuning_uses_all_models_or_a_subset_with_the_same_remainder(
    num_models: int, cores: int, tuned: int
) -> None:
    assert peer_autotune.tuning_size(num_models, cores) == tuned
    assert tuned == num_models or (num_models - tuned) % cores == 0
