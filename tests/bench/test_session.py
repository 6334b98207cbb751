"""A run from its plan to its last measurement, by an executor that makes them up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from ensemble.bench import session
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors.executor import Execute, OnProgress, TaskOf
from ensemble.bench.measurement import Measurement
from ensemble.bench.session import Session
from ensemble.bench.summary import Run, Summary
from ensemble.bench.workload import Workload
from ensemble.errors import RankError, Stopped
from tests.made import CONFIG, ENVIRONMENT, VMAP, changed, with_options

TWO = with_options(CONFIG, strategies=("loop", "vmap", "folded_vmap"), processes=2)
WORKLOAD = Workload(torch.device("cpu"), [], "made up", lambda px: torch.zeros(1, 3, px, px))


@dataclass
class Made:
    """An executor: each task gives a measurement of its case, and one of the reference."""

    before: Callable[[Task], None] = lambda task: None
    picks: str | None = None
    tasks: list[Task] = field(default_factory=list)
    saved: list[Run] = field(default_factory=list)

    @contextmanager
    def __call__(self, config: Config, workload: Workload) -> Iterator[Execute]:
        yield self.execute

    def execute(
        self, cases: Sequence[Case], task_of: TaskOf, on_progress: OnProgress
    ) -> Generator[Sequence[Measurement]]:
        for case in cases:
            if (task := task_of(case)) is None:
                continue
            self.before(task)
            self.tasks.append(task)
            one = Measurement(
                case, times_s=(1.0,) * 8, reference_times_s=(2.0,) * 8, picked=self.picks
            )
            reference = Measurement(
                replace(case, strategy="loop", dtype="float32"), times_s=(2.0,) * 8
            )
            yield [one, reference]

    def run(self, config: Config = TWO, *earlier: Summary) -> Session:
        return session.measure_all(
            config,
            Run(ENVIRONMENT, config.plain(), earlier),
            WORKLOAD,
            save=self.saved.append,
            say=lambda line: None,
            executor=self,
            show=lambda rows: nullcontext(lambda *_: None),
        )


def counts(run: Run) -> dict[str, int]:
    """How many processes each row has, in the order of the rows."""
    return {row.case.strategy: len(row.processes) for row in run.results}


def test_every_row_has_its_processes_and_the_reference_no_more_than_they() -> None:
    made = Made()
    done = made.run()
    assert counts(done.run) == {"loop": 2, "vmap": 2, "folded_vmap": 2}
    assert (done.planned, done.left, done.stopped, done.exit_code) == (3, (), "", 0)
    assert [task.process for task in made.tasks] == [0, 0, 1, 1]


def test_the_run_is_saved_after_each_process() -> None:
    made = Made()
    made.run()
    rows = [sum(counts(run).values()) for run in made.saved]
    assert rows == [1 + 1, 2 + 2, 3 + 2, 4 + 2]  # of strategies, and of the reference


def test_rows_are_in_the_order_of_the_plan_and_those_of_an_earlier_run_last() -> None:
    done = Made().run(TWO, changed(VMAP, strategy="jax"))
    assert list(counts(done.run)) == ["loop", "vmap", "folded_vmap", "jax"]


def test_a_reference_that_is_not_planned_gets_no_row() -> None:
    done = Made().run(with_options(TWO, strategies=("vmap",), dtype=("bfloat16",)))
    assert {row.case.dtype for row in done.run.results} == {"bfloat16"}


def test_the_first_process_chooses_for_all() -> None:
    made = Made(picks="folded_loop")
    made.run(with_options(TWO, strategies=("loop", "best")))
    assert [task.picked for task in made.tasks] == [None, "folded_loop"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed."""
    now = [1000.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def taking(seconds: float, clock: list[float]) -> Callable[[Task], None]:
    def take(task: Task) -> None:
        clock[0] += seconds

    return take


def test_a_time_budget_ends_the_run_after_the_process_in_which_it_is_over(
    clock: list[float],
) -> None:
    """Processes of 40 s: 1.5 minutes are over in the third of four."""
    done = Made(taking(40.0, clock)).run(with_options(TWO, max_minutes=1.5))
    assert counts(done.run) == {"loop": 2, "vmap": 2, "folded_vmap": 1}
    assert [case.strategy for case in done.left] == ["folded_vmap"]
    assert (done.stopped, done.exit_code) == ("1.5 minutes are over", 0)


def test_a_time_budget_that_ends_with_the_last_process_has_stopped_nothing(
    clock: list[float],
) -> None:
    done = Made(taking(40.0, clock)).run(with_options(TWO, max_minutes=2.5))
    assert (done.left, done.stopped) == ((), "")


@pytest.mark.parametrize(
    ("error", "stopped", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (Stopped(15), "stopped by SIGTERM", 143),
        (RankError("rank 1 has ended"), "rank 1 has ended", 1),
    ],
)
def test_what_stops_a_run_keeps_what_is_measured_and_has_an_exit_code(
    error: BaseException, stopped: str, code: int
) -> None:
    def interrupt(task: Task) -> None:
        if task.process:
            raise error

    done = Made(interrupt).run()
    assert counts(done.run) == {"loop": 2, "vmap": 1, "folded_vmap": 1}
    assert (done.stopped, done.exit_code) == (stopped, code)
