"""Rows under load of tiny models: every request its own answer, whatever fails a reason."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.bench import result_file
from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.load import batch_plans, runs
from ensemble.bench.load.batching import (
    ALONE,
    TOGETHER,
    Batch,
    Way,
)
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.measure import measure_under_load
from ensemble.bench.load.request_queue import Request
from ensemble.bench.report import curves
from ensemble.bench.setup import Setup, local_setup
from ensemble.bench.summary import Run, Summary
from ensemble.strategies import Strategy
from ensemble.strategies.build_result import BuildResult
from tests.made import CASE, CONFIG, ENVIRONMENT, row_of, with_options
from tests.tiny import tiny_models

CONFIG_UNDER_LOAD = with_options(
    CONFIG,
    scenario="server",
    target_qps=300.0,
    latency_percentile=90.0,
    latency_bound_ms=2000.0,
    min_seconds=0.1,
    max_batch=2,
    processes=0,
)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates here are asked for, not searched: a run need not last for 20 bounds."""
    monkeypatch.setattr(runs, "BOUNDS_LONG", 0.0)


def case(strategy: str, inputs: str = "shared") -> Case:
    return replace(CASE, strategy=strategy, num_models=3, image_size=8, inputs=inputs)


def prepared(asked: Case) -> Setup:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return local_setup([asked], tiny_models(3), lambda px: images)


def measured(asked: Case, config: Config = CONFIG_UNDER_LOAD) -> Summary:
    return measured_in(prepared(asked), asked, config)


def measured_in(setup: Setup, asked: Case, config: Config = CONFIG_UNDER_LOAD) -> Summary:
    assert config.load is not None
    found = measure_under_load(
        asked, setup, config.load, config.measure, seed=0, on_stage=lambda *_: None
    )
    return row_of(found)


def batches(made: Engine, lanes: int) -> list[Batch]:
    """A batch by every way, with images and lanes that are all different."""
    found = []
    for way in made.ways:
        computed = tuple(range(lanes)) if way.mode == TOGETHER else (lanes - 1,)
        requests = tuple(
            tuple(Request(0, 0, 5 * lane + slot, lane, 0.0) for slot in range(way.size))
            for lane in computed
        )
        found.append(Batch(way, computed, requests))
    return found


@pytest.mark.parametrize(
    ("strategy", "inputs", "expected"),
    [
        ("vmap", "shared", {(ALONE, 1), (ALONE, 2)}),
        ("loop", "per_model", {(ALONE, 1), (ALONE, 2)}),
        ("vmap", "per_model", {(TOGETHER, 1), (TOGETHER, 2)}),
        ("hybrid", "per_model", {(ALONE, 1), (ALONE, 2), (TOGETHER, 1), (TOGETHER, 2)}),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_every_way_gives_each_request_its_own_answer_and_a_mix_up_is_seen(
    strategy: str, inputs: str, expected: set[tuple[str, int]]
) -> None:
    asked = case(strategy, inputs)
    made = batch_plans.build_engine(asked, prepared(asked), max_batch=2, on_stage=lambda *_: None)
    assert {(way.mode, way.size) for way in made.ways} == expected
    assert made.told_apart()
    assert (made.max_rel_error or 0.0) < 1e-5
    lanes = 1 if inputs == "shared" else 3
    for batch in batches(made, lanes):
        assert made.compute(batch)[0] == 0
    made._images = made._images[1:] + made._images[:1]  # each request gets its neighbour's image
    for batch in batches(made, lanes):
        assert made.compute(batch)[0] == batch.count
    made._images = made._images[-1:] + made._images[:-1]
    if lanes > 1:
        made._expected = made._expected[[1, 2, 0]]  # and its neighbour's model
        for batch in batches(made, lanes):
            assert made.compute(batch)[0] == batch.count


@pytest.mark.parametrize(("strategy", "inputs"), [("vmap", "shared"), ("hybrid", "per_model")])
@pytest.mark.usefixtures("one_thread")
def test_under_loadgen_all_are_answered_rightly_and_the_files_say_so(
    strategy: str, inputs: str
) -> None:
    pytest.importorskip("mlperf_loadgen")
    found = measured(case(strategy, inputs))
    run = curves.shown(found)
    assert found.error is None
    assert run is not None
    assert (run.valid, run.refused, run.failed) == (True, 0, 0)
    assert run.answered == run.requests >= 81
    assert curves.held_qps(found) == 300.0
    assert run.p50_s is not None
    assert run.p90_s is not None
    assert run.p99_s is None
    assert 0 < run.p50_s <= run.p90_s < 2
    assert (run.overhead_s or 1.0) < 0.05
    written = Run(ENVIRONMENT, CONFIG_UNDER_LOAD.plain(), (found,))
    (flat,) = json.loads(result_file.to_json(written))["results"]
    for name in ("scenario", "held_qps", "p50_s", "requests", "refused", "wasted_share", "valid"):
        assert name in flat
    assert (flat["held_qps"], flat["answered"], flat["p99_s"]) == (300.0, run.answered, None)
    assert result_file.from_json(result_file.to_json(written)).results == (found,)


@pytest.mark.usefixtures("one_thread")
def test_at_far_more_than_is_held_requests_are_refused_and_the_accepted_do_not_wait_long() -> None:
    pytest.importorskip("mlperf_loadgen")
    config = with_options(
        CONFIG_UNDER_LOAD, target_qps=20_000.0, latency_bound_ms=20.0, min_seconds=3
    )
    found = measured(case("loop"), config)
    run = curves.shown(found)
    assert run is not None
    assert not run.valid
    assert run.refused > 0
    assert run.answered + run.refused == run.requests
    assert curves.held_qps(found) is None
    assert (run.most_waiting or 9999) < run.requests / 4
    assert (run.longest_s or 9.0) < 2.0  # a full queue, on a busy machine
    assert run.memory_growth_bytes is not None
    # A number for each refused request, which is told of at the end, and the referee's own list.
    assert run.memory_growth_bytes < 1_000_000 + 100 * run.refused


@pytest.mark.usefixtures("one_thread")
def test_a_strategy_that_raises_in_the_middle_is_a_row_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlperf_loadgen")
    calls: list[int] = []

    def breaks(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        def forward(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 60:
                raise RuntimeError("the device is gone")
            return torch.stack([model(x) for model in models])

        return BuildResult(forward)

    monkeypatch.setitem(strategies.STRATEGIES, "breaks", Strategy("eager", "loop", "breaks"))
    monkeypatch.setattr(Strategy, "builder", lambda self, **_: breaks)
    monkeypatch.setattr(batch_plans, "TIMED_S", 0.0)
    asked = case("breaks")
    images = torch.randn(16, 3, 8, 8)
    calls = []
    found = measured_in(local_setup([asked], tiny_models(3), lambda px: images), asked)
    run = curves.shown(found)
    assert found.status == "failed"
    assert run is not None
    assert run.failed > 0
    assert run.answered + run.failed == run.requests
    assert found.error == f"RuntimeError: the device is gone; {run.failed} requests failed"


@pytest.mark.usefixtures("one_thread")
def test_a_bound_below_one_call_is_said_and_nothing_is_played() -> None:
    config = with_options(CONFIG_UNDER_LOAD, target_qps=None, latency_bound_ms=1e-3)
    found = measured(case("loop"), config)
    assert found.status == "failed"
    assert "expected a bound of at least one call" in str(found.error)


def test_a_batch_is_padded_to_its_way_and_counts_what_is_wasted() -> None:
    requests = ((Request(1, 0, 0, 0, 0.0),), ())
    batch = Batch(Way(TOGETHER, 2, 1.0), (0, 1), requests)
    assert (batch.count, batch.slots) == (1, 4)
