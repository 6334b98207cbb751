"""Workers: rows in separate processes, and what one that dies costs."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ensemble
import resnet_vmap
from ensemble import files
from ensemble.bench import result_file, schedule, session
from ensemble.bench.case import Case, Task
from ensemble.bench.config import Config
from ensemble.bench.executors import fresh_process as workers
from ensemble.bench.executors.fresh_process import Job
from ensemble.bench.measurement import Measurement, Note
from ensemble.bench.report import exports, resuming
from ensemble.bench.summary import Run, Summary, merged
from ensemble.bench.workload import Workload
from ensemble.errors import InputError, Stopped
from ensemble.strategies import STRATEGIES, best
from tests.bench.executors import dying_strategies
from tests.made import CASE, CONFIG, ENVIRONMENT, ONE, ROW, changed, row_of, with_options
from tests.programs import signaled
from tests.tiny import tiny_models

if TYPE_CHECKING:
    from typing_extensions import Buffer

ROOT = Path(resnet_vmap.__file__).parent
QUICK = with_options(
    CONFIG,
    num_models=(3,),
    image_size=(8,),
    warmup=1,
    min_pairs=6,
    min_seconds=0.0,
    threads=1,
    processes=3,
    timeout_minutes=1.0,
)


@pytest.fixture(autouse=True)
def dying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The registry of this process, and of every worker, has the strategies that die."""
    code = "from tests.bench.executors.dying_strategies import install; install()\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    before = dict(STRATEGIES)
    dying_strategies.install()
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.fixture(scope="module")
def workload() -> Workload:
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Workload(torch.device("cpu"), tiny_models(3), "made up", {8: images}.__getitem__)


def case(strategy: str, **changes: object) -> Case:
    return replace(CASE, **{"num_models": 3, "image_size": 8, "strategy": strategy} | changes)  # type: ignore[arg-type]


def measured(
    config: Config, workload: Workload, *names: str
) -> tuple[dict[str, Measurement], dict[str, Measurement | None]]:
    """Measurements of these strategies, a worker each, and the reference's halves."""
    rows, halves = {}, {}
    with workers.jobs(config, workload) as job:
        cases = [case(name) for name in names]
        for row, *reference in workers.execute(job, cases, Task, lambda *_: None):
            rows[row.case.strategy] = row
            halves[row.case.strategy] = reference[0] if reference else None
    return rows, halves


def test_a_worker_measures_what_this_process_would(workload: Workload) -> None:
    rows, halves = measured(QUICK, workload, "vmap", "chatter")
    for name in ("vmap", "chatter"):
        assert rows[name].status == "ok"
        assert len(rows[name].times_s) == len(rows[name].reference_times_s) == 6
        assert (rows[name].max_rel_error or 0.0) < 1e-5
        reference = halves[name]
        assert reference is not None
        assert reference.case == case("loop")
        assert len(reference.times_s) >= 3
        assert reference.times_s == rows[name].reference_alone_times_s
    models, images = workload.models, workload.images(8)
    expected = [model(images[:1]).argmax(1).tolist() for model in models]
    assert rows["vmap"].top1 == expected


def test_only_the_first_process_of_a_row_asks_what_the_others_would_find_too() -> None:
    """The error against float64, and whether the check is weak: of models and images alone."""
    models = tiny_models(2)
    for model in models:
        model.get_parameter("fc.weight").zero_()
    images = {8: torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    blind = Workload(torch.device("cpu"), models, "made up", images.__getitem__)
    asked, numbers = case("lowered_vmap", num_models=2), iter((0, 0, 0, 1))
    with workers.jobs(QUICK, blind) as job:
        (first, _), (second, _) = workers.execute(
            job, (asked, asked), lambda case: Task(case, next(numbers)), lambda *_: None
        )
    assert (first.status, second.status) == ("ok", "ok")
    assert first.error_float64 is not None
    assert second.error_float64 is None
    assert any("check is weak" in note.text for note in first.notes)
    assert not any("check is weak" in note.text for note in second.notes)


def test_a_worker_that_dies_costs_its_own_row(workload: Workload) -> None:
    rows, _ = measured(QUICK, workload, "kill", "crash", "leave", "vmap")
    assert [row.status for row in rows.values()] == ["failed", "failed", "failed", "ok"]
    assert re.fullmatch(
        r"killed by signal 9 \(out of memory\? \d\.\d GB of \d+ GB held at most\);"
        " last line of stderr: about to go",
        str(rows["kill"].error),
    )
    assert str(rows["crash"].error).startswith("killed by signal 11 (SIGSEGV)")
    assert str(rows["leave"].error).startswith("exited with code 3 without a result")


def pids_of_workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that are started from now on, as they are."""
    popen, found = subprocess.Popen, list[int]()

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        process = popen(*arguments, **options)
        found.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_cases_that_share_a_worker_are_measured_in_turn_and_a_fresh_one_follows_a_failed_case(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator. Each process times the reference alone once."""
    started = pids_of_workers(monkeypatch)
    names = ["vmap", "folded_loop", "kill", "chatter", "folded_vmap"]
    with workers.jobs(QUICK, workload) as job:
        shared = replace(job, shares_workers=True)
        found = list(workers.execute(shared, list(map(case, names)), Task, lambda *_: None))
    assert [rows[0].case.strategy for rows in found] == names
    assert [rows[0].status for rows in found] == ["ok", "ok", "failed", "ok", "ok"]
    assert str(found[2][0].error).startswith("killed by signal 9")
    assert [len(rows) for rows in found] == [2, 1, 1, 2, 1]  # with the reference's half
    assert found[0][0].reference_alone_times_s == found[1][0].reference_alone_times_s
    assert found[0][0].reference_alone_times_s != found[3][0].reference_alone_times_s
    assert len(started) == 2


def test_a_case_that_raises_leaves_the_others_of_its_worker_to_a_fresh_one(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error may be one of the CUDA context, which every later call of the process reports."""
    started = pids_of_workers(monkeypatch)
    with workers.jobs(QUICK, workload) as job:
        shared, cases = replace(job, shares_workers=True), list(map(case, ("broken", "vmap")))
        (broken,), (row, _) = workers.execute(shared, cases, Task, lambda *_: None)
    assert (broken.status, broken.error) == ("failed", "RuntimeError: CUDA error: unknown")
    assert (row.status, len(started)) == ("ok", 2)


@pytest.mark.parametrize(("broken", "processes"), [(False, 1), (True, 2)])
def test_a_case_that_is_refused_leaves_the_others_to_its_worker_if_the_device_still_answers(
    broken: bool,
    processes: int,
    workload: Workload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if broken:
        code = (
            "from ensemble.machine import devices\n"
            "from tests.bench.executors import dying_strategies\n"
            "wait = devices.synchronize\n"
            "def synchronize(device):\n"
            "    if dying_strategies.REFUSED: raise RuntimeError('CUDA error')\n"
            "    wait(device)\n"
            "devices.synchronize = synchronize\n"
        )
        file = tmp_path / "sitecustomize.py"
        file.write_text(file.read_text() + code)
    started = pids_of_workers(monkeypatch)
    with workers.jobs(QUICK, workload) as job:
        shared, cases = replace(job, shares_workers=True), list(map(case, ("refused", "vmap")))
        (refused,), (row, _) = workers.execute(shared, cases, Task, lambda *_: None)
    assert (refused.status, refused.error) == ("unavailable", "not on this device")
    assert (row.status, len(started)) == ("ok", processes)


def test_a_closed_executor_ends_the_worker_that_its_cases_share(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a time budget that is over does."""
    started = pids_of_workers(monkeypatch)
    with workers.jobs(QUICK, workload) as job:
        shared, cases = replace(job, shares_workers=True), list(map(case, ("vmap", "hang")))
        rows = workers.execute(shared, cases, Task, lambda *_: None)
        assert next(rows)[0].status == "ok"
        rows.close()
    assert not Path(f"/proc/{started[0]}").exists()


def test_models_that_cannot_be_loaded_to_the_device_fail_the_row_with_the_reason(
    workload: Workload, tmp_path: Path
) -> None:
    error = "CUDA out of memory. Tried to allocate 20 MiB"
    code = "from tests.bench.executors.simulated_accelerator import install"
    (tmp_path / "sitecustomize.py").write_text(f"{code}; install({error!r})\n")
    on_cuda = replace(workload, device=torch.device("cuda"))
    rows, _ = measured(QUICK, on_cuda, "vmap")
    assert (rows["vmap"].status, rows["vmap"].error) == (
        "failed",
        f"loading 3 models on cuda failed: OutOfMemoryError: {error}",
    )


@pytest.mark.slow
def test_a_worker_that_says_nothing_is_given_up(workload: Workload) -> None:
    begin = time.monotonic()
    rows, _ = measured(with_options(QUICK, timeout_minutes=0.15), workload, "hang", "vmap")
    assert (rows["hang"].status, rows["hang"].error) == ("failed", "no answer in 9 s")
    assert rows["vmap"].status == "ok"
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_a_worker_that_allocates_until_it_is_killed_costs_its_own_row(
    workload: Workload, tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, -1))\n"
    file = tmp_path / "sitecustomize.py"
    file.write_text(limit + file.read_text())
    rows, _ = measured(QUICK, workload, "hoard", "vmap")
    assert str(rows["hoard"].error).startswith("killed by signal 9 (out of memory? ")
    assert rows["vmap"].status == "ok"


def test_models_reach_a_worker_as_they_are_and_mapped(workload: Workload, tmp_path: Path) -> None:
    from ensemble.bench import workload as loading

    path = str(tmp_path / "shared.pt")
    workload.save_shared(path, (8,))
    loaded = loading.load_shared(path, QUICK, device="cpu")
    for model, other in zip(workload.models, loaded.models, strict=True):
        for (name, tensor), found in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, found), name
    assert path in Path("/proc/self/maps").read_text()
    assert torch.equal(loaded.images(8), workload.images(8))
    few = loading.load_shared(path, QUICK, device="cpu", num_models=2)
    assert len(few.models) == 2
    assert torch.equal(
        few.models[1].get_parameter("fc.weight"), workload.models[1].get_parameter("fc.weight")
    )


def test_a_worker_has_its_models_and_images_on_the_accelerator(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under fake tensors, which need no GPU: what is mapped on the CPU goes to the device."""
    from ensemble.bench import setup
    from ensemble.bench import workload as loading
    from ensemble.machine import devices

    path, cuda = str(tmp_path / "shared.pt"), torch.device("cuda")
    workload.save_shared(path, (8,))
    monkeypatch.setattr(devices, "select_device", torch.device)
    # functorch copies modules deeply, and with a fake tensor goes a copy of its whole mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False)
    with FakeTensorMode():
        loaded = loading.load_shared(path, QUICK, device="cuda")
        example = setup.make_example(loaded.images(8), case("vmap", inputs="per_model"))
        logits = ensemble.build("vmap", loaded.models, example)(example)
    assert {tensor.device.type for model in loaded.models for tensor in model.buffers()} == {"cuda"}
    assert (logits.device.type, logits.shape, loaded.device) == ("cuda", (3, 1, 5), cuda)


def test_a_worker_that_never_starts_is_given_up_after_one_time_limit(
    workload: Workload, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)\n")
    begin = time.monotonic()
    rows, _ = measured(with_options(QUICK, timeout_minutes=0.05), workload, "vmap")
    assert rows["vmap"].error == "no answer in 3 s"
    assert time.monotonic() - begin < 5


def run_rounds(
    speedups: dict[str, list[float]], config: Config, *, failing: str = ""
) -> dict[str, int]:
    """How many processes each strategy gets, where its processes find these speedups."""
    cases = [case(name) for name in ("loop", *speedups)]
    rows: dict[Case, Summary] = {}
    for batch in schedule.groups(cases, rows, config):
        for asked in batch:
            if not schedule.wants_more(rows.get(asked), config):
                continue
            before = rows.get(asked)
            number = len(before.processes) if before else 0
            if asked.strategy == failing:
                new = Measurement(asked, "failed", "broke")
            else:
                ratio = 1.0 if asked.is_reference else speedups[asked.strategy][number]
                reference = () if asked.is_reference else (0.1,) * 8
                times = (0.1 / ratio,) * 8
                new = Measurement(asked, times_s=times, reference_times_s=reference)
            rows[asked] = merged(before, new)
    counts = {asked.strategy: len(row.processes) for asked, row in rows.items()}
    return counts if not speedups or failing else {name: counts[name] for name in speedups}


STEADY, WILD = [1.50, 1.51, 1.50, 1.49, 1.50], [1.0, 1.3, 0.8, 1.1, 1.2] * 8


def test_every_row_gets_the_same_number_of_processes_whatever_they_find() -> None:
    config = with_options(QUICK, processes=5)
    assert run_rounds({"vmap": STEADY, "folded_vmap": WILD}, config) == {
        "vmap": 5,
        "folded_vmap": 5,
    }
    assert run_rounds({"vmap": WILD}, with_options(config, processes=2)) == {"vmap": 2}
    assert run_rounds({"vmap": WILD}, with_options(config, processes=1)) == {"vmap": 1}


def test_further_processes_are_planned_once_from_the_first_ones() -> None:
    """Logs of 1.0, 1.3, 0.8, 1.1, 1.2: deviation 0.185, t 2.776, half-width 0.23; for 0.10 (as
    atanh) 5 * 2.29 ** 2 = 26.2 processes."""
    config = with_options(QUICK, processes=5, max_ci_percent=10.0)
    assert run_rounds({"vmap": STEADY, "folded_vmap": WILD}, config) == {
        "vmap": 5,
        "folded_vmap": 27,
    }
    then_steady = WILD[:5] + [1.07] * 35  # what comes later changes no plan
    assert run_rounds({"vmap": then_steady}, config) == {"vmap": 27}
    strict = with_options(config, max_ci_percent=1.0)
    assert run_rounds({"vmap": WILD}, strict) == {"vmap": schedule.MAX_PLANNED}
    loose = with_options(config, max_ci_percent=500.0)
    assert run_rounds({"vmap": WILD}, loose) == {"vmap": 5}


def test_a_row_that_failed_gets_no_more_and_the_reference_then_runs_by_itself() -> None:
    found = run_rounds({"vmap": [1.0] * 6}, with_options(QUICK, processes=5), failing="vmap")
    assert found == {"vmap": 0, "loop": 1}
    assert run_rounds({}, with_options(QUICK, processes=5)) == {"loop": 5}


def test_the_processes_of_a_row_are_spread_over_the_run() -> None:
    cases = [case(name) for name in ("loop", "vmap", "folded_vmap")]
    groups = schedule.groups(cases, {}, with_options(QUICK, processes=5))
    assert [asked.strategy for asked in next(groups)] == ["vmap", "folded_vmap"]


def sharing(names: Sequence[str], config: Config) -> list[list[tuple[int, list[str]]]]:
    """The groups of cases for N = 1 to 4, of which workers measure those of an N: N and names."""
    cases = [case(name, num_models=n) for n in (1, 2, 3, 4) for name in names]
    rows: dict[Case, Summary] = {}
    found = []
    for group in schedule.groups(cases, rows, config, share_workers=True):
        batches: dict[int, list[str]] = {}
        for asked in group:
            batches.setdefault(asked.num_models, []).append(asked.strategy)
            new = Measurement(asked, times_s=(1.0,) * 8, reference_times_s=(2.0,) * 8)
            rows[asked] = merged(rows.get(asked), new)
        found.append(list(batches.items()))
    return found


def test_workers_that_are_shared_measure_a_grid_point_each_in_an_order_of_their_own() -> None:
    names = ("vmap", "folded_vmap", "concurrent", "folded_loop")
    found = sharing(("loop", *names), with_options(QUICK, processes=5))
    assert [[n for n, _ in batches] for batches in found[:10]] == [[1, 2, 3], [4]] * 5
    orders = [tuple(order) for batches in found[:10] for _, order in batches]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) > 10  # of 24 that there are, in 20 processes
    assert found == sharing(("loop", *names), with_options(QUICK, processes=5))
    other = sharing(("loop", *names), with_options(QUICK, processes=5, seed=1))
    assert found != other


@pytest.mark.parametrize(
    ("device", "options", "shares"),
    [
        ("cuda:1", {}, True),
        ("xpu", {}, True),
        ("cpu", {}, False),
        ("cuda", {"scenario": "offline"}, False),
        ("cuda", {"processes": 0}, False),
    ],
)
def test_workers_are_shared_on_an_accelerator_but_not_by_load_tests(
    device: str, options: dict[str, object], shares: bool
) -> None:
    assert schedule.shares_workers(with_options(QUICK, **options), device) is shares


def test_what_the_processes_of_a_row_share_is_asked_of_them_together() -> None:
    asked = with_options(QUICK, processes=3, min_pairs=20, min_seconds=2.0)
    each = schedule.of_one_process(asked).measure
    assert each.min_pairs == 7
    assert each.min_seconds == pytest.approx(2 / 3)
    one = schedule.of_one_process(with_options(asked, processes=1)).measure
    assert (one.min_pairs, one.min_seconds) == (20, 2.0)


def test_a_process_that_fails_fails_its_row_and_says_which_it_was() -> None:
    second = Measurement(ROW.case, "failed", "broke", max_rel_error=0.5)
    found = merged(changed(ROW, max_rel_error=0.1), second)
    assert (found.status, found.error) == ("failed", "in process 2: broke")
    assert found.max_rel_error == 0.5
    assert len(found.processes) == len(ROW.processes)


def test_notes_that_differ_in_their_figures_alone_are_kept_once() -> None:
    notes = Note("setting: a", "tried: a 1 ms"), Note("same")
    others = Note("setting: a", "tried: a 2 ms"), Note("setting: b", "tried"), Note("same")
    assert row_of(replace(ONE, notes=notes), replace(ONE, notes=others)).notes == (
        "setting: a (tried: a 1 ms)",
        "same",
        "setting: b (tried)",
    )


def test_a_session_fills_the_reference_from_its_calls_alone_in_the_processes_of_others(
    workload: Workload,
) -> None:
    config = with_options(QUICK, strategies=("loop", "vmap", "kill"), min_pairs=18)
    saved: list[Run] = []
    done = session.measure_all(
        config,
        Run(ENVIRONMENT, config.plain(), ()),
        workload,
        save=saved.append,
        say=lambda _: None,
    )
    rows = {row.case.strategy: row for row in done.run.results}
    assert list(rows) == ["loop", "vmap", "kill"]
    assert len(rows["vmap"].processes) == 3
    assert [len(process.times_s) for process in rows["vmap"].processes] == [6, 6, 6]
    alone = rows["vmap"].processes[0].reference_alone_times_s
    assert rows["loop"].times_s[: len(alone)] == alone
    assert rows["loop"].speedup == 1.0
    assert rows["kill"].status == "failed"
    assert rows["vmap"].speedup_interval is not None
    assert len(saved) == 4  # after each worker
    again = result_file.from_json(result_file.to_json(done.run))
    assert again == done.run


def test_rows_that_need_cuda_are_unavailable_on_a_cpu_and_start_no_process(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "Worker", None)
    config = with_options(QUICK, strategies=("cudagraph_loop", "cudagraph_compiled_vmap"))
    done = session.measure_all(
        config,
        Run(ENVIRONMENT, config.plain(), ()),
        workload,
        save=lambda _: None,
        show=lambda _: nullcontext(lambda *_: None),
        say=lambda _: None,
    )
    assert [(row.status, row.error) for row in done.run.results] == [
        ("unavailable", "CUDA graphs require a CUDA device, got cpu")
    ] * 2


@pytest.mark.slow
def test_what_the_first_process_of_best_picks_the_others_run_too(workload: Workload) -> None:
    config = with_options(QUICK, strategies=("best",), min_pairs=18)
    done = session.measure_all(
        config,
        Run(ENVIRONMENT, config.plain(), ()),
        workload,
        save=lambda _: None,
        show=lambda _: nullcontext(lambda *_: None),
        say=lambda _: None,
    )
    (row,) = done.run.results
    assert row.status == "ok", row.error
    assert row.picked in best.CANDIDATES["cpu"]
    assert [process.tune_s is not None for process in row.processes] == [True, False, False]
    assert sum(note.startswith("picked ") for note in row.notes) == 1
    assert (row.build_s or 0) > (row.processes[0].tune_s or 0) > 0
    again = result_file.from_json(result_file.to_json(done.run))
    assert again == done.run


def test_a_budget_keeps_what_its_last_worker_has_measured_and_the_rest_is_resumed(
    workload: Workload,
) -> None:
    config = with_options(QUICK, strategies=("loop", "vmap"), min_pairs=18, max_minutes=1e-6)
    run = Run(ENVIRONMENT, config.plain(), ())

    def measure(config: Config, run: Run) -> session.Session:
        return session.measure_all(
            config,
            run,
            workload,
            save=lambda _: None,
            say=lambda _: None,
        )

    begun = measure(config, run)
    counts = {row.case.strategy: len(row.processes) for row in begun.run.results}
    assert (begun.stopped, counts) == ("1e-06 minutes are over", {"loop": 1, "vmap": 1})
    assert [asked.strategy for asked in begun.left] == ["loop", "vmap"]
    unbounded = with_options(config, max_minutes=None)
    rows = measure(unbounded, resuming.resume(unbounded, run, begun.run)).run.results
    assert [len(row.processes) for row in rows] == [3, 3]
    assert [row.processes[0] for row in rows] == [row.processes[0] for row in begun.run.results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted: "),
        (signal.SIGTERM, 143, "stopped by SIGTERM: "),
        (signal.SIGHUP, 129, "stopped by SIGHUP: "),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_a_signal_ends_all_workers_within_a_second_and_keeps_what_is_finished(
    number: signal.Signals, code: int, says: str, tmp_path: Path
) -> None:
    """And nothing is left in the temporary folder."""
    target = tmp_path / "run.json"
    argv = ["--image_size", "32", "--strategies", "vmap", "hang", "--export_json", str(target)]
    argv += ["--min_pairs", "6", "--min_seconds", "0", "--image_path", str(ROOT / "kitten.jpg")]
    environment = os.environ | {"TORCH_HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    (tmp_path / "scratch").mkdir()
    environment |= {"https_proxy": "http://127.0.0.1:9", "TMPDIR": str(tmp_path / "scratch")}
    at = "hang, 2 models, process 1: build"
    ended = signaled(argv, number, at=at, cwd=tmp_path, env=environment)
    assert ended.code == code
    # init waits for those of the dead
    assert ended.children_s < (10.0 if number == signal.SIGKILL else 1.0)
    assert says in ended.err
    assert list((tmp_path / "scratch").iterdir()) == []
    (row,) = exports.read(str(target), argument="").results
    assert (row.case.strategy, row.status) == ("vmap", "ok")
    assert ended.children


def test_files_of_the_working_folder_are_not_run_by_a_worker(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ensemble", "copy", "random", "models", "torch"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "__init__.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path / "work")
    rows, _ = measured(QUICK, workload, "vmap")
    assert rows["vmap"].status == "ok", rows["vmap"].error


def test_a_worker_imports_the_package_of_its_parent_and_nothing_beside_it_first(
    tmp_path: Path,
) -> None:
    """The folder that the package lies in, site-packages say, comes after the standard library."""
    other = tmp_path / "ensemble.py"
    other.write_text("raise SystemExit('another package of that name')")
    show = "import ensemble, sys; print(ensemble.__file__, sys.path[-1]); "
    start = workers.START.replace("from ensemble.bench.executors.worker import main; main()", show)
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, str(ROOT), str(workers.PACKAGE)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(workers.PACKAGE), str(ROOT)], done.stderr


def test_a_worker_whose_parent_has_ended_before_it_could_tell_ends(workload: Workload) -> None:
    """Its number is another process's, as after the parent's end."""
    start = [sys.executable, "-P", "-c", workers.START, str(ROOT), str(workers.PACKAGE)]
    done = subprocess.run([*start, "1", "loop", "cpu"], stdin=subprocess.PIPE, timeout=60)
    assert done.returncode == 1


def test_without_room_in_the_temporary_folder_the_shared_file_lies_in_memory(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", nowhere)
    rows, _ = measured(QUICK, workload, "vmap")
    assert rows["vmap"].status == "ok", rows["vmap"].error


def test_without_room_anywhere_the_place_and_the_way_out_are_said(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/full")
    message = r"MB .* \(/full\) or to memory: No space left on device; set TMPDIR"
    with pytest.raises(InputError, match=message), workers.jobs(QUICK, workload):
        pass


def test_a_file_that_no_longer_fits_while_it_is_written_is_said_too(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer makes its own RuntimeError of what the system said."""
    file = Path("/dev/full").open("wb")  # noqa: SIM115  # closed by what it is given to
    monkeypatch.setattr("ensemble.files.anonymous_file", lambda *_, **__: file)
    with pytest.raises(InputError, match="No space left on device"), workers.jobs(QUICK, workload):
        pass


@pytest.mark.parametrize("write", [1, 2, 9])
def test_an_interrupt_while_the_shared_file_is_written_stays_one(
    write: int, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer raises its own RuntimeError as it propagates."""
    calls = iter(range(1, 10**6))

    class Interrupted(io.FileIO):
        def write(self, data: Buffer) -> int:
            if next(calls) == write:
                raise Stopped(signal.SIGTERM)
            return super().write(data) or 0

    file = Interrupted(os.open(os.devnull, os.O_RDWR), "w+")
    monkeypatch.setattr("ensemble.files.anonymous_file", lambda *_, **__: file)
    run = Run(ENVIRONMENT, QUICK.plain(), ())
    done = session.measure_all(QUICK, run, workload, save=lambda _: None, say=lambda _: None)
    assert (done.stopped, done.exit_code) == ("stopped by SIGTERM", 143)


def test_workers_that_cannot_be_started_cost_their_own_rows(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds no process (`ulimit -u`), the third no thread, the fourth no file."""
    started: list[subprocess.Popen[str]] = []
    popen, thread, file = subprocess.Popen, threading.Thread.start, files.anonymous_file

    def start_process(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        if arguments[0][-2] == "crash":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*arguments, **options))
        return started[-1]

    def start_thread(self: threading.Thread) -> None:
        if started[-1].args[-2] == "leave":  # type: ignore[index]
            raise RuntimeError("can't start new thread")
        thread(self)

    def open_file(size: int = 0, **options: Any) -> BinaryIO:
        if len(started) == 2:
            raise OSError(24, "Too many open files")
        return file(size, **options)

    monkeypatch.setattr(subprocess, "Popen", start_process)
    monkeypatch.setattr(threading.Thread, "start", start_thread)
    monkeypatch.setattr(files, "anonymous_file", open_file)
    rows, _ = measured(QUICK, workload, "vmap", "crash", "leave", "kill")
    assert rows["vmap"].status == "ok", rows["vmap"].error
    assert [(rows[name].status, rows[name].error) for name in ("crash", "leave", "kill")] == [
        ("failed", "the worker cannot be started: Resource temporarily unavailable"),
        ("failed", "the worker cannot be started: can't start new thread"),
        ("failed", "the worker cannot be started: Too many open files"),
    ]
    assert all(process.returncode is not None for process in started)


def test_a_job_holds_its_file_only_as_long_as_it_runs(workload: Workload) -> None:
    with workers.jobs(QUICK, workload) as job:
        assert isinstance(job, Job)
        assert Path(job.shared).exists()
    assert not Path(job.shared).exists()


COMPILED = replace(QUICK, run=replace(QUICK.run, strategies=("loop", "compiled_loop")))


def test_the_processes_of_a_case_share_caches_that_no_other_case_or_run_has_filled(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in workers.CACHES:
        monkeypatch.delenv(name, raising=False)
    found = list[str]()
    for _ in range(2):
        with workers.jobs(COMPILED, workload) as job:
            for one in (case("compiled_loop"), case("compiled_loop", num_models=2)):
                assert job.environment([one]) == job.environment([one])
                found += [job.environment([one])[name] for name in workers.CACHES]
            assert job.caches
            assert os.path.isdir(job.caches)
        assert not os.path.exists(job.caches)
    assert len(set(found)) == 2 * 2 * 2


def test_workers_that_do_not_compile_have_no_folder_for_it(workload: Workload) -> None:
    with workers.jobs(QUICK, workload) as job:
        assert job.caches is None
        assert job.environment([case("vmap")]) == {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_caches_that_the_user_has_set_are_kept(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with workers.jobs(COMPILED, workload) as job:
        environment = job.environment([case("compiled_loop")])
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
        assert environment["TRITON_CACHE_DIR"].startswith(str(job.caches))
