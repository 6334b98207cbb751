"""Load tests of tiny models: every request gets its own answer, every failure a reason."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble import strategies
from ensemble.bench import build as build_module
from ensemble.bench import result_file
from ensemble.bench.build import BuiltStrategy
from ensemble.bench.case import Case
from ensemble.bench.config import Config
from ensemble.bench.load import engine_builder, load_tester, measure_load
from ensemble.bench.load.batching import (
    ALL_TENANTS,
    SINGLE_TENANT,
    Batch,
    BatchPlan,
)
from ensemble.bench.load.engine import Engine
from ensemble.bench.load.measure_load import measure_under_load
from ensemble.bench.load.request_queue import Request
from ensemble.bench.report import curves
from ensemble.bench.setup import Setup, local_setup
from ensemble.bench.summary import Run, Summary
from ensemble.bench.timed_calls import TimedCalls
from ensemble.errors import UnavailableError
from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
    set_float32_precision,
)
from ensemble.models import stacking
from ensemble.strategies import Strategy, eager
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
    """Rates are given here, not searched: a run need not last for 20 bounds."""
    monkeypatch.setattr(load_tester, "MIN_RUN_BOUNDS", 0.0)


def case_of(strategy: str, inputs: str = "shared") -> Case:
    return replace(CASE, strategy=strategy, num_models=3, image_size=8, inputs=inputs)


def setup_of(case: Case) -> Setup:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return local_setup([case], tiny_models(3), lambda px: images)


def measured(case: Case, config: Config = CONFIG_UNDER_LOAD) -> Summary:
    return measured_in(setup_of(case), case, config)


def measured_in(setup: Setup, case: Case, config: Config = CONFIG_UNDER_LOAD) -> Summary:
    assert config.load is not None
    found = measure_under_load(
        case, setup, config.load, config.measure, seed=0, on_stage=lambda *_: None
    )
    return row_of(found)


def batches(engine: Engine, tenants: int) -> list[Batch]:
    """A batch of every plan, each request with a different image and tenant."""
    found = []
    for plan in engine.plans:
        tenants_run = tuple(range(tenants)) if plan.mode == ALL_TENANTS else (tenants - 1,)
        requests = tuple(
            tuple(Request(0, 0, 5 * tenant + slot, tenant, 0.0) for slot in range(plan.batch_size))
            for tenant in tenants_run
        )
        found.append(Batch(plan, tenants_run, requests))
    return found


@pytest.mark.parametrize(
    ("strategy", "inputs", "expected"),
    [
        ("vmap", "shared", {(SINGLE_TENANT, 1), (SINGLE_TENANT, 2)}),
        ("loop", "per_model", {(SINGLE_TENANT, 1), (SINGLE_TENANT, 2)}),
        ("vmap", "per_model", {(ALL_TENANTS, 1), (ALL_TENANTS, 2)}),
        (
            "hybrid",
            "per_model",
            {(SINGLE_TENANT, 1), (SINGLE_TENANT, 2), (ALL_TENANTS, 1), (ALL_TENANTS, 2)},
        ),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_every_plan_answers_each_request_and_a_mixed_up_image_or_model_is_detected(
    strategy: str, inputs: str, expected: set[tuple[str, int]]
) -> None:
    case = case_of(strategy, inputs)
    engine = engine_builder.build_engine(
        case, setup_of(case), max_batch=2, on_stage=lambda *_: None
    )
    assert {(plan.mode, plan.batch_size) for plan in engine.plans} == expected
    assert engine.distinguishes_images()
    assert (engine.max_rel_error or 0.0) < 1e-5
    tenants = 1 if inputs == "shared" else 3
    for batch in batches(engine, tenants):
        assert engine.execute(batch)[0] == 0
    # Each request gets its neighbor's image, then its neighbor's model.
    engine._images = engine._images[1:] + engine._images[:1]
    for batch in batches(engine, tenants):
        assert engine.execute(batch)[0] == batch.num_requests
    engine._images = engine._images[-1:] + engine._images[:-1]
    if tenants > 1:
        engine._expected = engine._expected[[1, 2, 0]]
        for batch in batches(engine, tenants):
            assert engine.execute(batch)[0] == batch.num_requests


class Builder:
    """Builds a loop, and notes the shape of each build and of each further plan; `planned` gives
    the run of a plan."""

    def __init__(self, planned: Callable[[Any], Any] = lambda run: run) -> None:
        self.built, self.planned = list[tuple[int, ...]](), list[tuple[int, ...]]()
        self._planned = planned

    def __call__(self, models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        self.built.append(tuple(example.shape))
        loop = eager.loop(models, example)
        assert loop.serving is not None

        def plan(_: nn.Module | None, x: Tensor) -> Any:
            self.planned.append(tuple(x.shape))
            return self._planned(loop.forward)

        return replace(loop, serving=replace(loop.serving, plan=plan))

    def install(self, monkeypatch: pytest.MonkeyPatch, *, sequential: bool) -> None:
        strategy = Strategy("eager", "loop", "counted", sequential=sequential)
        monkeypatch.setitem(strategies.STRATEGIES, "counted", strategy)
        monkeypatch.setattr(Strategy, "builder", lambda *_, **__: self)


@pytest.mark.parametrize(
    ("inputs", "sequential", "built", "planned"),
    [
        ("shared", False, [(4, 3, 8, 8)], [(2, 3, 8, 8), (1, 3, 8, 8)]),
        ("per_model", True, [(4, 3, 8, 8)] * 3, [(2, 3, 8, 8)] * 3 + [(1, 3, 8, 8)] * 3),
        ("per_model", False, [(3, 4, 3, 8, 8)], [(3, 2, 3, 8, 8), (3, 1, 3, 8, 8)]),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_strategy_is_built_once_a_tenant_and_prepared_for_smaller_batches(
    inputs: str,
    sequential: bool,
    built: list[tuple[int, ...]],
    planned: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, builder = case_of("counted", inputs), Builder()
    setup = setup_of(case)
    builder.install(monkeypatch, sequential=sequential)
    engine = engine_builder.build_engine(case, setup, max_batch=4, on_stage=lambda *_: None)
    assert (builder.built, builder.planned) == (built, planned)
    assert [plan.batch_size for plan in engine.plans] == [1, 2, 4]
    for batch in batches(engine, 1 if inputs == "shared" else 3):
        assert engine.execute(batch)[0] == 0


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_plan_fails_the_row_with_its_mode_and_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of("counted", "per_model")
    setup = setup_of(case)

    def wrong(run: Any) -> Any:
        return lambda x: 1.1 * torch.stack(run(x).outputs) if x.shape[-4] == 1 else run(x)

    Builder(wrong).install(monkeypatch, sequential=False)
    row = measured_in(setup, case)
    assert row.status == "failed"
    assert str(row.error).startswith("all-tenant batch 1: ")


@pytest.mark.usefixtures("one_thread")
def test_a_batch_size_that_cannot_be_planned_makes_the_row_unavailable_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: Any) -> Any:
        raise UnavailableError("even batches only")

    case = case_of("counted")
    setup = setup_of(case)
    Builder(refuse).install(monkeypatch, sequential=False)
    row = measured_in(setup, case)
    assert (row.status, row.error) == ("unavailable", "even batches only")


@pytest.mark.parametrize(
    ("strategy", "inputs"), [("lowered_vmap", "shared"), ("lowered_hybrid", "per_model")]
)
@pytest.mark.usefixtures("one_thread")
def test_batch_sizes_share_the_packed_weights_and_have_memory_for_activations_of_their_own(
    strategy: str, inputs: str
) -> None:
    case = case_of(strategy, inputs)
    setup = setup_of(case)
    engines = [
        engine_builder.build_engine(case, setup, max_batch=size, on_stage=lambda *_: None)
        for size in (1, 16)
    ]
    weights = [engine.weight_bytes for engine in engines]
    held = [engine.held_bytes for engine in engines]
    assert weights[0] == weights[1]
    assert weights[0] is not None
    assert held[0] is not None
    assert held[1] is not None
    assert weights[0] < held[0] < held[1]


@pytest.mark.usefixtures("one_thread")
def test_memory_under_load_counts_a_stack_that_tenants_share_once() -> None:
    pytest.importorskip("mlperf_loadgen")
    stack = {name: t.clone() for name, t in stacking.stacked_state(tiny_models(3)).items()}
    models = tiny_models(3)
    for index, model in enumerate(models):
        stacking.set_tensors(model, {name: tensor[index] for name, tensor in stack.items()})
    case = case_of("hybrid", "per_model")  # the loop of each tenant, and vmap of all
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (found,) = measured_in(local_setup([case], models, lambda px: images), case).measurements
    size = sum(tensor.nbytes for tensor in stack.values())
    assert (found.held_bytes, found.bytes_per_model) == (size, size // 3)


class Segmenter(nn.Sequential):
    """`(B, 3, H, W)` -> `(B, 2, H, W)`, which depends on each pixel."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Regressor(nn.Module):
    """`(B, 3, H, W)` -> `(B,)`"""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((1, 2, 3))


@pytest.mark.parametrize("kind", [Segmenter, Regressor])
@pytest.mark.parametrize(("strategy", "inputs"), [("loop", "shared"), ("hybrid", "per_model")])
@pytest.mark.usefixtures("one_thread")
def test_answers_of_any_shape_are_checked(
    kind: type[nn.Module], strategy: str, inputs: str
) -> None:
    case = case_of(strategy, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [kind().eval() for _ in range(3)]
        images = torch.randn(16, 3, 8, 8)
    setup = local_setup([case], models, lambda px: images)
    engine = engine_builder.build_engine(case, setup, max_batch=2, on_stage=lambda *_: None)
    tenants = 1 if inputs == "shared" else 3
    for batch in batches(engine, tenants):
        assert engine.execute(batch)[0] == 0
    engine._images = engine._images[1:] + engine._images[:1]
    for batch in batches(engine, tenants):
        assert engine.execute(batch)[0] == batch.num_requests


def test_models_without_a_result_for_each_image_are_unavailable_under_load() -> None:
    class Whole(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    setup = local_setup([case_of("loop")], [Whole().eval()] * 3, lambda px: torch.ones(16, 3, 8, 8))
    row = measured_in(setup, case_of("loop"))
    expected = "load tests expect outputs (B, ...), a real one per image, got () of a batch of one"
    assert (row.status, row.error) == ("unavailable", expected)


@pytest.mark.parametrize(("strategy", "inputs"), [("vmap", "shared"), ("hybrid", "per_model")])
@pytest.mark.usefixtures("one_thread")
def test_under_loadgen_every_request_is_answered_and_the_result_file_has_the_figures(
    strategy: str, inputs: str
) -> None:
    pytest.importorskip("mlperf_loadgen")
    found = measured(case_of(strategy, inputs))
    run = curves.reported_run(found)
    assert found.error is None
    assert run is not None
    assert (run.valid, run.refused, run.failed) == (True, 0, 0)
    assert run.answered == run.requests >= 81
    assert curves.sustained_qps(found) == 300.0
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
def test_under_overload_requests_are_refused_and_accepted_ones_keep_a_bounded_latency() -> None:
    pytest.importorskip("mlperf_loadgen")
    config = with_options(
        CONFIG_UNDER_LOAD, target_qps=20_000.0, latency_bound_ms=20.0, min_seconds=3
    )
    found = measured(case_of("loop"), config)
    run = curves.reported_run(found)
    assert run is not None
    assert not run.valid
    assert run.refused > 0
    assert run.answered + run.refused == run.requests
    assert curves.sustained_qps(found) is None
    assert (run.most_waiting or 9999) < run.requests / 4
    assert (run.longest_s or 9.0) < 2.0  # a full queue, on a busy machine
    assert run.memory_growth_bytes is not None
    # A number per refused request and LoadGen's own records; not an image (768 bytes) of each.
    assert run.memory_growth_bytes < 1_000_000 + 550 * run.refused


@pytest.mark.usefixtures("one_thread")
def test_a_strategy_that_raises_during_a_run_fails_its_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlperf_loadgen")
    calls: list[int] = []

    def breaks(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        def forward(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 90:
                raise RuntimeError("the device is gone")
            return torch.stack([model(x) for model in models])

        return BuildResult(forward)

    monkeypatch.setitem(strategies.STRATEGIES, "breaks", Strategy("eager", "loop", "breaks"))
    monkeypatch.setattr(Strategy, "builder", lambda self, **_: breaks)
    monkeypatch.setattr(engine_builder, "MIN_TIMED_S", 0.0)
    case = case_of("breaks")
    images = torch.randn(16, 3, 8, 8)
    calls = []
    found = measured_in(local_setup([case], tiny_models(3), lambda px: images), case)
    run = curves.reported_run(found)
    assert found.status == "failed"
    assert run is not None
    assert run.failed > 0
    assert run.answered + run.failed == run.requests
    assert found.error == f"RuntimeError: the device is gone; {run.failed} requests failed"


@pytest.mark.usefixtures("one_thread")
def test_a_strategy_that_answers_from_a_cache_of_inputs_fails_under_load() -> None:
    planted = Path(__file__).parents[1] / "planted_strategies.py"
    found = measured(case_of(f"{planted}:caches_by_values"))
    assert found.status == "failed"
    assert re.match(
        r"answers repeated inputs from a cache, \d+x faster than new ones", str(found.error)
    )


@pytest.mark.usefixtures("one_thread")
def test_a_latency_bound_shorter_than_one_call_fails_without_a_run() -> None:
    config = with_options(CONFIG_UNDER_LOAD, target_qps=None, latency_bound_ms=1e-3)
    found = measured(case_of("loop"), config)
    assert found.status == "failed"
    assert "the latency bound (0.001 ms) is shorter than one call (" in str(found.error)


def test_a_batch_is_padded_to_its_plan_and_counts_the_padding() -> None:
    requests = ((Request(1, 0, 0, 0, 0.0),), ())
    batch = Batch(BatchPlan(ALL_TENANTS, 2, 1.0), (0, 1), requests)
    assert (batch.num_requests, batch.num_slots) == (1, 4)


@pytest.mark.usefixtures("one_thread")
def test_under_load_a_row_in_tf32_is_served_in_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def switch(precision: Float32Precision, device: torch.device) -> None:
        set_float32_precision(precision)  # as on CUDA

    found: list[Float32Precision] = []

    def notes_flags(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
        def forward(x: Tensor) -> Tensor:
            found.append(current_float32_precision())
            return torch.stack([model(x) for model in models])

        return BuildResult(forward)

    monkeypatch.setattr(build_module, "switch_float32_precision", switch)
    monkeypatch.setattr(build_module, "check_supported", lambda numbers, device: None)
    monkeypatch.setitem(strategies.STRATEGIES, "notes", Strategy("eager", "loop", "notes"))
    case = replace(case_of("notes"), dtype="tf32")
    with float32_precision(Float32Precision.IEEE):
        setup = setup_of(case)
        monkeypatch.setattr(Strategy, "builder", lambda self, **_: notes_flags)
        engine = engine_builder.build_engine(case, setup, max_batch=2, on_stage=lambda *_: None)
        set_float32_precision(Float32Precision.IEEE)
        found.clear()
        for batch in batches(engine, 1):
            assert engine.execute(batch)[0] == 0
    assert found == [Float32Precision.TF32] * 2


@pytest.mark.usefixtures("one_thread")
def test_requests_have_their_images_in_host_memory_and_plans_are_timed_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_host: list[Tensor] = []
    timed: list[torch.Size] = []

    def pinned(x: Tensor) -> Tensor:
        on_host.append(x.clone())
        return on_host[-1]

    def calls(built: BuiltStrategy, example: Tensor) -> TimedCalls:
        timed.append(built.example.shape)
        return TimedCalls(built, example)

    monkeypatch.setattr(engine_builder, "pinned", pinned)
    monkeypatch.setattr(engine_builder, "calls_from_host", calls)
    case = case_of("loop")
    engine = engine_builder.build_engine(
        case, setup_of(case), max_batch=2, on_stage=lambda *_: None
    )
    (images,) = on_host
    assert [image.data_ptr() for image in engine._images] == [x.data_ptr() for x in images]
    assert timed == [(1, 3, 8, 8), (2, 3, 8, 8)]
    assert engine.device == torch.device("cpu")


def test_the_latency_bound_of_the_loop_includes_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    on_host: list[Tensor] = []

    def pinned(x: Tensor) -> Tensor:
        on_host.append(x.clone())
        return on_host[-1]

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x is on_host[0]
            return x.flatten(1)

    monkeypatch.setattr(measure_load, "pinned", pinned)
    case = case_of("loop")
    setup = replace(setup_of(case), models=[Reads()])
    config = with_options(CONFIG_UNDER_LOAD, latency_bound_ms=None)
    assert config.load is not None
    assert measure_load._bound_s(case, setup, config.load, warmup=1) > 0
    assert len(on_host) == 1
