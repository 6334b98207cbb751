"""Strategies from files of the user, and what a benchmark must not believe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ensemble
import resnet_vmap
from ensemble.bench.report import exports
from ensemble.bench.summary import Summary
from ensemble.models.vision import torchvision
from ensemble.strategies import user
from tests.tiny import tiny_models

ROOT = Path(resnet_vmap.__file__).parent
PLANTED = Path(__file__).with_name("planted_strategies.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "ten.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    return str(path)


@pytest.fixture
def here(checkpoint: str, tmp_path: Path) -> list[str]:
    """The command line of a quick run in this process."""
    options = "--processes 0 --image_size 32 --min_seconds 0 --min_pairs 8 --num_models 2"
    return [*options.split(), "--model_path", checkpoint, "--export_json", str(tmp_path / "r.json")]


def row_of(here: list[str], function: str, *more: str) -> Summary:
    """The row of a planted strategy, which the program reads from its file."""
    strategy = f"{PLANTED}:{function}"
    resnet_vmap.main([*here, "--overwrite", "--strategies", "loop", strategy, *more])
    rows = exports.read(here[-1], argument="").results
    return next(row for row in rows if row.case.strategy == strategy)


def test_an_own_strategy_is_measured_like_any_other(here: list[str]) -> None:
    row = row_of(here, "honest")
    assert row.status == "ok"
    assert len(row.times_s) == len(row.reference_times_s) == 8
    assert row.max_rel_error == 0.0
    assert row.build_s is not None
    assert row.peak_memory_bytes is not None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("caches_by_object", "in a timed call with a new input, the answer to an earlier input"),
        (
            "answers_with_a_constant",
            "in a timed call with a new input, the answer to an earlier input",
        ),
        ("wrong_from_the_third_call_on", "in a timed call with a new input, outputs disagree"),
        ("wrong_in_every_third_call", "in a timed call with a new input, outputs disagree"),
        ("computes_later", "outputs disagree"),
        ("raises", "OSError: no engine here"),
        ("gives_nothing", "expected gives_nothing to return a callable, got NoneType"),
    ],
)
def test_what_is_wrong_or_fails_is_a_failed_row_with_the_reason(
    here: list[str], function: str, reason: str
) -> None:
    row = row_of(here, function)
    assert row.status == "failed"
    assert reason in (row.error or "")
    assert row.speedup is None


def test_a_cache_of_inputs_gains_nothing(here: list[str]) -> None:
    row = row_of(here, "caches_by_values")
    assert row.status == "ok"
    assert (row.speedup or 0) < 2  # each timed call has an input of its own


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        ("leaks", " MB per call"),
        ("spins", "busy between calls"),
        ("leaves_a_process_busy", "busy between calls"),
    ],
)
def test_what_a_strategy_leaves_behind_is_a_note(
    here: list[str], function: str, remark: str
) -> None:
    for _ in range(5):  # on a busy machine what is left behind may get no time
        row = row_of(here, function)
        user.load(str(PLANTED), "stop")()
        assert row.status == "ok"
        if found := [note for note in row.notes if note.endswith(remark)]:
            break
    assert found, row.notes


def test_an_honest_strategy_leaves_nothing_behind(here: list[str]) -> None:
    assert row_of(here, "honest").notes == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py:build", "expected a file at nothing.py, got none"),
        (f"{PLANTED}:missing", f"expected a function missing in {PLANTED}, got none"),
        (f"{PLANTED}:NOT_A_FUNCTION", f"expected a function NOT_A_FUNCTION in {PLANTED}, got int"),
        (str(PLANTED), f"expected PATH.py:FUNCTION, got {PLANTED}"),
        (f"{PLANTED}:", f"expected PATH.py:FUNCTION, got {PLANTED}:"),
    ],
)
def test_a_file_or_function_that_is_missing_is_one_line_and_exit_code_2(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resnet_vmap.main(["--strategies", "loop", name]) == 2
    assert capsys.readouterr().err == f"error: --strategies: {message}\n"


def test_a_file_that_raises_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (line, reason) in enumerate(
        {
            "import nothing_of_this_name": "ModuleNotFoundError: No module named",
            "def build(:": "SyntaxError: ",
            "raise SystemExit(3)": "SystemExit: 3",
        }.items()
    ):
        path = tmp_path / f"mine{number}.py"
        path.write_text(line)
        assert resnet_vmap.main(["--strategies", f"{path}:build"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --strategies: {path} cannot be imported: {reason}")
        assert error.count("\n") == 1


def test_an_own_strategy_runs_in_workers_from_its_folder_with_modules_beside_it(
    checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "engine.py").write_text("import torch\nstack = torch.stack\n")
    (tmp_path / "mine.py").write_text(
        "import engine\n"
        "def build(models, example):\n"
        "    return lambda x: engine.stack([model(x) for model in models])\n"
    )
    options = (
        "--processes 1 --image_size 32 --min_seconds 0 --num_models 2 --strategies mine.py:build"
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "resnet_vmap.py"),
            *options.split(),
            "--model_path",
            checkpoint,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "mine.py:build  2" in done.stdout


def test_the_package_builds_an_own_strategy() -> None:
    models, x = tiny_models(2), torch.randn(1, 3, 8, 8)
    forward = ensemble.build(f"{PLANTED}:honest", models, x)
    torch.testing.assert_close(forward(x), torch.stack([model(x) for model in models]))
    with pytest.raises(ensemble.UnavailableError, match="no engine here"):
        ensemble.build(f"{PLANTED}:raises", models, x)
    with pytest.raises(ValueError, match=r"or PATH\.py:FUNCTION, got 'nothing'"):
        ensemble.build("nothing", models, x)
