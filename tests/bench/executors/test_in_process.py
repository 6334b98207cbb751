"""Rows from build to times: each failure costs its own row, with a reason."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from ensemble.bench import failures, roofline, session, setup
from ensemble.bench.build import BuiltStrategy, build
from ensemble.bench.case import Task
from ensemble.bench.config import Config
from ensemble.bench.executors.in_process import in_process
from ensemble.bench.summary import Run, Summary, merged
from ensemble.bench.workload import Workload
from ensemble.errors import UnavailableError
from ensemble.machine import other_processes
from ensemble.machine.dtypes import NumericFormat
from ensemble.models.vision import torchvision
from ensemble.statistics import MIN_PAIRS_FOR_INTERVAL
from ensemble.strategies import STRATEGIES, best
from ensemble.strategies.build_result import Builder, BuildResult
from ensemble.strategies.stacked_outputs import stack_outputs
from tests.made import CONFIG, ENVIRONMENT, with_options
from tests.tiny import tiny_models

QUICK = with_options(
    CONFIG, processes=0, num_models=(3,), image_size=(8,), warmup=1, min_pairs=8, min_seconds=0.0
)


@dataclass(frozen=True)
class Made:
    """A strategy of a test's own."""

    make: Callable[[Sequence[nn.Module], Tensor], Callable[[Tensor], Tensor]]
    summary: str = "made for a test"
    uses_fast_algorithms: bool = False
    has_kernels: bool = False
    requires: str = ""

    def builder(self, *, tune_seconds: float = 0.0) -> Builder:
        return lambda models, example: BuildResult(self.make(models, example))


def looping(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([model(x) for model in models])


def run(config: Config) -> list[Summary]:
    torch.manual_seed(0)
    largest = config.models
    images = torch.randn(max(largest.batch_size) * max(largest.num_models), 3, 8, 8)
    done = session.measure_all(
        config,
        Run(ENVIRONMENT, config.plain(), ()),
        made_up(tiny_models(max(largest.num_models)), images),
        save=lambda _: None,
        say=lambda _: None,
        executor=in_process,
        show=lambda _: nullcontext(lambda *_: None),
    )
    return list(done.run.results)


def started(config: Config, models: Sequence[nn.Module], images: Tensor) -> Iterator[Summary]:
    """The rows of a configuration of one grid point, as they come."""
    with in_process(config, made_up(models, images)) as execute:
        for measurements in execute(config.plan(), Task, lambda *_: None):
            yield from (merged(None, one) for one in measurements)


def made_up(models: Sequence[nn.Module], images: Tensor) -> Workload:
    """Images of another size are resized."""

    def sized(px: int) -> Tensor:
        return nn.functional.interpolate(images, (px, px))

    return Workload(torch.device("cpu"), models, "made up", sized)


def run_made(
    make: Callable[[Sequence[nn.Module], Tensor], Callable[[Tensor], Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    config: Config = QUICK,
) -> Summary:
    """The row of a strategy of the test's own, between two rows that must stay whole."""
    monkeypatch.setitem(STRATEGIES, "made", Made(make))
    before, made, after = run(with_options(config, strategies=("loop", "made", "vmap")))
    assert before.status == after.status == "ok"
    assert after.speedup is not None
    return made


@pytest.mark.parametrize("inputs", ["shared", "per_model"])
def test_both_strategies_agree_and_are_timed_in_pairs_with_the_reference(inputs: str) -> None:
    loop, vmap = run(with_options(QUICK, inputs=inputs, batch_size=(2,)))
    assert loop.case.is_reference
    assert loop.reference_times_s == ()
    assert len(loop.times_s) == 8
    assert len(vmap.times_s) == len(vmap.reference_times_s) == 8
    assert vmap.max_rel_error is not None
    assert vmap.max_rel_error < 1e-5
    assert vmap.top1 == loop.top1
    assert [len(row) for row in vmap.top1 or []] == [2, 2, 2]
    assert vmap.build_s is not None
    assert vmap.build_s > 0


def test_the_classes_are_those_that_each_model_finds_in_its_own_images() -> None:
    config = with_options(QUICK, inputs="per_model", batch_size=(2,))
    torch.manual_seed(0)
    images = torch.randn(6, 3, 8, 8)
    models = tiny_models(3)
    expected = [
        model(batch).argmax(1).tolist()
        for model, batch in zip(models, images.split(2), strict=True)
    ]
    rows = started(config, models, images)
    assert [row.top1 for row in rows] == [expected, expected]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_a_lower_precision_are_compared_with_the_float32_loop(dtype: str) -> None:
    loop, vmap = run(with_options(QUICK, dtype=(dtype,)))
    for row in (loop, vmap):
        assert row.status == "ok"
        assert 1e-5 < (row.max_rel_error or 0) < 3e-2
        assert len(row.reference_times_s) == 8
        assert not row.case.is_reference


def test_several_numbers_of_models_are_measured_one_after_another() -> None:
    rows = run(with_options(QUICK, num_models=(1, 3)))
    assert [(row.case.strategy, row.case.num_models) for row in rows] == [
        ("loop", 1),
        ("vmap", 1),
        ("loop", 3),
        ("vmap", 3),
    ]
    assert [len(row.top1 or []) for row in rows] == [1, 1, 3, 3]


def test_the_self_check_times_the_reference_against_itself() -> None:
    row = run(with_options(QUICK, self_check=True))[-1]
    assert (row.case.strategy, row.max_rel_error, len(row.reference_times_s)) == (
        "self_check",
        0.0,
        8,
    )


def test_a_swapped_pair_of_models_gets_a_reason_and_no_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def swapped(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: looping([models[1], models[0], models[2]], x)

    row = run_made(swapped, monkeypatch)
    assert row.status == "failed"
    assert row.error is not None
    assert row.error.startswith("outputs disagree: model ")
    assert row.times_s == ()
    assert row.speedup is None


def test_logits_that_go_wrong_after_the_timed_calls_fail_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that was freed is overwritten only then."""
    loop, timed = STRATEGIES["loop"].builder(), list[str]()

    def after_the_timed_calls(own: Sequence[int]) -> float:
        timed.append("row")
        return 0.0

    monkeypatch.setattr(other_processes, "busy_cores", after_the_timed_calls)

    def builder(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        forward = loop(models, example).forward

        def forgetful(x: Tensor) -> Tensor:
            logits = stack_outputs(forward(x), len(models))
            return logits * float("nan") if timed == ["row", "row"] else logits

        return forgetful

    monkeypatch.setitem(STRATEGIES, "vmap", Made(builder))
    _, row = run(QUICK)
    assert row.status == "failed"
    assert (row.error or "").startswith("after its timed calls, ")
    assert row.times_s == ()


@pytest.mark.usefixtures("one_thread")
def test_the_reference_is_timed_alone_before_a_strategy_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A strategy slows the loop from its build on: the speedup is over the loop of before."""
    loop, slowed = STRATEGIES["loop"].builder(), list[bool]()

    def slowed_loop(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        forward = loop(models, example).forward

        def call(x: Tensor) -> Tensor:
            time.sleep(0.05 if slowed else 0.01)
            return stack_outputs(forward(x), len(models))

        return call

    def builder(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        slowed.append(True)
        forward = loop(models, example).forward

        def call(x: Tensor) -> Tensor:
            time.sleep(0.01)
            return stack_outputs(forward(x), len(models))

        return call

    monkeypatch.setitem(STRATEGIES, "loop", Made(slowed_loop))
    monkeypatch.setitem(STRATEGIES, "vmap", Made(builder))
    pairs = 2 * MIN_PAIRS_FOR_INTERVAL  # half as many calls alone, however slow the machine
    _, row = run(with_options(QUICK, strategies=("loop", "vmap"), min_pairs=pairs))
    (one,) = row.measurements
    assert len(one.reference_alone_times_s) == MIN_PAIRS_FOR_INTERVAL
    assert median(one.reference_times_s) > 0.05
    assert median(one.reference_alone_times_s) < 0.03
    assert 0.5 < (row.speedup or 0) < 2  # over the slowed loop 5
    assert row.reference_median_s == median(one.reference_alone_times_s)


def test_the_roofline_is_measured_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype) -> roofline.Limits:
        asked.append(dtype)
        return roofline.Limits(1e9, 1e9)

    monkeypatch.setattr(roofline, "measure_limits", measure)
    rows = run(with_options(QUICK, roofline=True, self_check=True, dtype=("bfloat16",)))
    assert asked == [torch.bfloat16, torch.float32]
    # 8 x 3 x 3 x 3 weights at 8 x 8 places, 8 x 5 in the last layer, 3 models, 2 a multiply-add
    found = [row.roofline for row in rows if row.roofline]
    assert found[0].least_s == pytest.approx(3 * 2 * (216 * 64 + 40) / 1e9)
    assert [one.bound for one in found] == ["compute"] * 3


ERRORS = [
    (
        TypeError("Cannot convert a MPS Tensor to float64\nand more"),
        "TypeError: Cannot convert a MPS",
    ),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
]


def failing(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_pass_in_float64_that_fails_costs_its_own_figure_only(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "in_float64", failing(error))
    apart = Made(lambda models, _: lambda x: looping(models, x), uses_fast_algorithms=True)
    monkeypatch.setitem(STRATEGIES, "made", apart)
    for row in run(with_options(QUICK, strategies=("loop", "made"))):
        assert (row.status, row.error, row.error_float64) == ("ok", None, None)
        assert len(row.times_s) == 8
        (note,) = row.notes
        assert note.startswith(f"no error to float64: {reason}")
        assert "\n" not in note


@pytest.mark.parametrize("function", ["measure_limits", "work"])
@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_a_roofline_that_fails_costs_its_own_figure_only(
    function: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "measure_limits", lambda *_: roofline.Limits(1e9, 1e9))
    monkeypatch.setattr(roofline, function, failing(error))
    for row in run(with_options(QUICK, roofline=True)):
        assert row.roofline is not None
        found = row.roofline.least_s, row.roofline.bound
        assert (row.status, row.error, *found) == ("ok", None, None, None)
        assert len(row.times_s) == 8
        (note,) = row.notes
        assert note.startswith(f"no roofline: {reason}")
        assert "\n" not in note


def test_a_roofline_that_fails_in_one_dtype_stands_in_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(device: torch.device, dtype: torch.dtype) -> roofline.Limits:
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return roofline.Limits(1e9, 1e9)

    monkeypatch.setattr(roofline, "measure_limits", measure)
    rows = run(with_options(QUICK, roofline=True, dtype=("float32", "bfloat16")))
    found = [row.roofline.least_s for row in rows if row.roofline]
    assert [least_s is not None for least_s in found] == [True, True, False, False]
    assert [len(row.notes) for row in rows] == [0, 0, 1, 1]


def test_a_strategy_that_cannot_run_here_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        raise UnavailableError("needs CUDA")

    row = run_made(refuse, monkeypatch)
    assert (row.status, row.error) == ("unavailable", "needs CUDA")


def test_a_strategy_that_breaks_is_a_row_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        raise KeyError("a\nb")

    row = run_made(broken, monkeypatch)
    assert (row.status, row.error) == ("failed", "KeyError: 'a\\nb'")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_a_lack_of_memory_says_how_many_models_would_fit(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        if len(models) > 2:
            raise error
        return lambda x: looping(models, x)

    row = run_made(greedy, monkeypatch, with_options(QUICK, num_models=(8,)))
    assert row.status == "failed"
    assert row.error == "out of memory with 8 models; 2 would fit (tried by halving)"


def test_a_reference_that_fails_fails_each_row_of_its_n_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short_of_memory(
        name: str, models: Sequence[nn.Module], example: Tensor, numbers: NumericFormat, **_: float
    ) -> BuiltStrategy:
        if len(models) > 2:
            raise torch.OutOfMemoryError
        return build(name, models, example, numbers)

    monkeypatch.setattr(setup, "build", short_of_memory)
    monkeypatch.setattr(failures, "build", short_of_memory)
    rows = run(with_options(QUICK, num_models=(4, 2)))
    reason = "the reference failed: out of memory with 4 models; 2 would fit (tried by halving)"
    assert [(row.case.num_models, row.status, row.error) for row in rows] == [
        (4, "failed", reason),
        (4, "failed", reason),
        (2, "ok", None),
        (2, "ok", None),
    ]


@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_an_operation_without_a_batching_rule_is_reported_with_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def falling_back(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            mapped = torch.vmap(lambda values: torch.histc(values, 3).sum() * 0)
            return looping(models, x) + mapped(x).sum()

        return forward

    row = run_made(falling_back, monkeypatch)
    assert any("batching rule" in note and "histc" in note for note in row.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_strategy_that_compiles_again_in_later_calls_fails_with_that_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def restless(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        calls = [0]

        def forward(x: Tensor) -> Tensor:
            calls[0] += 1
            scale = 1.0 + 0.0 * calls[0]
            one = torch.compile(lambda y, n: y * scale + 0 * n, backend="eager", dynamic=False)
            return looping(models, one(x, calls[0]))

        return forward

    row = run_made(restless, monkeypatch)
    assert row.status == "failed"
    assert row.error is not None
    assert "recompil" in row.error.lower()


@pytest.mark.parametrize("blind", [[0, 1, 2], [1]])
def test_weights_that_ignore_the_image_make_the_check_weak_and_that_is_said(
    blind: list[int],
) -> None:
    models = tiny_models(3)
    for index in blind:
        models[index].get_parameter("fc.weight").zero_()
    rows = started(QUICK, models, torch.randn(1, 3, 8, 8))
    assert all("the check is weak" in row.notes[0] for row in rows)
    assert all(row.notes == () for row in run(QUICK))


def test_what_a_strategy_allocates_counts_as_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def hoarding(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        hoard = torch.ones(50_000_000, dtype=torch.uint8)
        return lambda x: looping(models, x) + hoard[0] * 0

    row = run_made(hoarding, monkeypatch)
    if row.peak_memory_bytes is None:
        pytest.skip("this platform does not tell the peak of a part of a run")
    assert 50_000_000 <= row.peak_memory_bytes < 60_000_000


def test_an_interrupt_is_not_taken_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setitem(STRATEGIES, "made", Made(interrupted))
    rows = started(
        with_options(QUICK, strategies=("loop", "made")), tiny_models(3), torch.randn(1, 3, 8, 8)
    )
    assert next(rows).status == "ok"
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_a_grid_is_run_point_by_point_and_each_row_stands_where_its_point_says() -> None:
    config = with_options(
        QUICK,
        num_models=(1, 2),
        batch_size=(1, 2),
        image_size=(8, 12),
        dtype=("float32", "bfloat16"),
    )
    rows = run(config)
    assert [row.status for row in rows] == ["ok"] * 32
    assert [row.case.grid_point for row in rows[:8]] == [(1, 1, 8)] * 4 + [(2, 1, 8)] * 4
    assert [(row.case.strategy, row.case.dtype) for row in rows[:4]] == [
        ("loop", "float32"),
        ("vmap", "float32"),
        ("loop", "bfloat16"),
        ("vmap", "bfloat16"),
    ]
    assert rows[-1].case.grid_point == (2, 2, 12)
    assert all(len(row.top1 or []) == row.case.num_models for row in rows)
    assert all(len((row.top1 or [[]])[0]) == row.case.batch_size for row in rows)


def test_the_reference_of_a_grid_point_is_built_once_for_all_dtypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.dtype] = []
    loop = STRATEGIES["loop"].builder()

    def noted(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        made.append(example.dtype)
        return loop(models, example).forward

    monkeypatch.setitem(STRATEGIES, "loop", Made(noted))
    run(with_options(QUICK, dtype=("float32", "bfloat16")))
    assert made == [torch.float32, torch.bfloat16]


def test_the_row_of_best_says_what_was_picked_what_was_tried_and_what_that_took() -> None:
    config = with_options(QUICK, strategies=("loop", "best"), dtype=("float32", "bfloat16"))
    rows = [row for row in run(config) if row.case.strategy == "best"]
    assert [row.case.dtype for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row.status == "ok"
        assert row.picked in best.CANDIDATES["cpu"]
        assert row.name == f"best ({row.picked})"
        (note,) = (note for note in row.notes if note.startswith("picked "))
        assert note.startswith(f"picked {row.picked} (tried: ")
        assert 0 < (row.tune_s or 0) < (row.build_s or 0)


def test_only_strategies_that_round_apart_bring_the_error_against_float64() -> None:
    models = [torchvision.models.resnet18(num_classes=5).eval() for _ in range(2)]
    config = with_options(QUICK, num_models=(2,), image_size=(32,), strategies=("loop", "vmap"))
    images = torch.randn(1, 3, 32, 32)
    assert all(row.error_float64 is None for row in started(config, models, images))
    config = with_options(config, strategies=("loop", "lowered_vmap"))
    loop, winograd = started(config, models, images)
    assert 0 < (loop.error_float64 or 0) < 2e-5
    assert 0 < (winograd.error_float64 or 0) < 2e-5


def test_a_convolution_that_no_number_of_models_can_run_is_not_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unsupported(models: Sequence[nn.Module], example: Tensor) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    row = run_made(unsupported, monkeypatch, with_options(QUICK, num_models=(4,)))
    assert row.error == (
        "RuntimeError: GET was unable to find an engine to execute this computation"
    )
