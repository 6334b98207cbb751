"""The real command: in this process where that shows the same, else as a separate process."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import resnet_vmap
from ensemble.bench import summary, workload
from ensemble.bench.case import Case
from ensemble.bench.cli import parse
from ensemble.bench.config import Config, ReportOptions, config_of
from ensemble.bench.report import exports, show
from ensemble.bench.summary import Run
from ensemble.errors import InputError
from ensemble.files import write_atomically
from ensemble.machine import cores, memory, timing
from ensemble.machine.cores import Cores
from ensemble.models import pretrained
from ensemble.models.vision import torchvision
from ensemble.strategies import STRATEGIES
from tests.made import (
    CONFIG,
    ENVIRONMENT,
    LOOP,
    VMAP,
    changed,
)
from tests.programs import signaled

ROOT = Path(resnet_vmap.__file__).parent
KITTEN = str(ROOT / "kitten.jpg")
QUICK = ["--image_path", KITTEN, "--image_size", "32", "--warmup", "0"]
QUICK += ["--min_pairs", "8", "--min_seconds", "0", "--processes", "0"]
QUICK += ["--strategies", "loop", "vmap"]


@pytest.fixture(autouse=True)
def tests_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are judged as if nothing else ran, and take half of the calls."""
    monkeypatch.setattr(summary, "TOO_BUSY", 1.0)
    monkeypatch.setattr(timing, "LONG_S", 0.0)  # no untimed call before each timed one
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "ten.pth"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    return str(path)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must end with exit code 2 and print no result."""
    assert resnet_vmap.main(argv) == 2
    captured = capsys.readouterr()
    assert "Serving multiple models" not in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_lines_that_users_of_the_original_know_come_in_their_order(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resnet_vmap.main([*QUICK, "--model_path", checkpoint, "--num_models", "3"]) == 0
    out = capsys.readouterr().out
    known = [
        f"Loading resnet model from {re.escape(checkpoint)}",
        f"Loading image from {re.escape(KITTEN)}",
        r"Converted image to shape torch.Size\(\[1, 3, 32, 32\]\)",
        "Running Sample prediction",
        r"Prediction: class \d, probability 0\.\d+",
        "Serving multiple models",
        r"Time taken for prediction without vmap: 0\.\d{6}",
        r"Time taken for prediction with vmap: 0\.\d{6}",
        "\n3 models: ",
        r"\nloop +3 .* 1 \(reference\)",
        r"\nvmap +3 .* (\d\.\d\d \[|too noisy)",  # on a busy machine
    ]
    places = [match.start() if (match := re.search(line, out)) else line for line in known]
    assert all(isinstance(place, int) for place in places), places
    assert places == sorted(places, key=int)


def test_the_sample_prediction_is_what_torchvision_predicts_for_each_of_five_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, expected = [], []
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(
        crop_size=32, resize_size=37
    )
    from PIL import Image

    x = preset(Image.open(KITTEN)).unsqueeze(0)
    for seed in range(5):
        torch.manual_seed(seed)
        model = torchvision.models.resnet18(num_classes=10)
        paths.append(str(tmp_path / f"{seed}.pth"))
        torch.save(model.state_dict(), paths[-1])
        with torch.no_grad():
            probabilities = model.eval()(x)[0].softmax(0)
        label = int(probabilities.argmax())
        expected.append((f"class {label}", float(probabilities[label]), paths[-1]))
    target = tmp_path / "run.json"
    argv = [*QUICK, "--model_path", *paths, "--export_json", str(target)]
    assert resnet_vmap.main(argv) == 0
    found = re.findall(
        r"Prediction: (class \d+), probability (\S+) \((.*)\)", capsys.readouterr().out
    )
    assert [(label, path) for label, _, path in found] == [(one[0], one[2]) for one in expected]
    assert [float(one[1]) for one in found] == pytest.approx([one[1] for one in expected], abs=6e-4)
    rows = json.loads(target.read_text())["results"]
    labels = [[int(one[0].split()[1])] for one in expected]
    assert [row["top1"] for row in rows] == [labels, labels]


def test_verbose_prints_the_model_the_top_five_and_every_raw_time(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resnet_vmap.main([*QUICK, "--model_path", checkpoint, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "(layer4): Sequential(" in out
    assert [f"  top {rank}: class" in out for rank in (2, 3, 4, 5)] == [True] * 4
    assert re.search(r"vmap, 2 models, times in s: \((\d+\.\d+, ){7}\d+\.\d+\)", out)


def test_without_weights_and_without_a_network_random_weights_are_said_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pretrained, "published_url", lambda arch: "http://127.0.0.1:9/resnet18-f37072fd.pth"
    )
    torch_hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    try:
        assert resnet_vmap.main(QUICK) == 0
    finally:
        torch.hub.set_dir(torch_hub)
    out = capsys.readouterr().out
    assert "using random weights, seeds 0 to 1\nThe predicted class is meaningless" in out
    assert "the timings are not" in out


def test_the_default_file_is_used_where_it_lies_in_the_working_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(state, "resnet18-f37072fd.pth")
    assert resnet_vmap.main(QUICK) == 0
    assert "Loading resnet model from resnet18-f37072fd.pth\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--num_models", "0"],
            "argument --num_models: expected a whole number from 1 to 1,000,000",
        ),
        (["--num_models", "two"], "got 'two'"),
        (
            ["--batch_size", "-1"],
            "argument --batch_size: expected a whole number from 1 to 1,000,000",
        ),
        (
            ["--image_size", "0"],
            "argument --image_size: expected a whole number from 1 to 1,000,000",
        ),
        (["--min_seconds", "nan"], "argument --min_seconds: expected a number of seconds"),
        (["--warmup", "-1"], "argument --warmup: expected a whole number of at least 0"),
        (["--threads", "0"], "argument --threads: expected a whole number from 1 to 1024"),
        (["--threads", "99999999"], "argument --threads: expected a whole number from 1 to 1024"),
        (["--image_size", str(10**6)], "--image_size: expected at most 100,000,000 pixels"),
        (["--image_size", "32", "90000"], "--image_size: expected at most 100,000,000 pixels"),
        (["--image_size", "1" + 400 * "0"], "expected a whole number from 1 to 1,000,000"),
        (["--timeout_minutes", "1e10"], "--timeout_minutes: expected a number of minutes"),
        (["--plot", ""], "--plot: expected a value, got an empty one"),
        (["--from_json", ""], "--from_json: expected a value, got an empty one"),
        (["--model_path", ""], "--model_path: expected a value, got an empty one"),
        (["--export_json", KITTEN], "--export_json: expected a separate file, got the input"),
        (["--export_json", "resnet18-f37072fd.pth"], "to write, got a checkpoint's name"),
        (["--export_csv", "a", "--export_json", "a"], "expected a separate file, got --export"),
        (["--export_csv", "a_grid.png", "--plot", "a.png"], "--plot: expected a separate file"),
        (["--plot", "a.gif"], "--plot: expected a name that ends in .png or .svg, got a.gif"),
        (
            ["--resume", "a.json", "--export_csv", "a.json"],
            "--export_csv: expected a separate file",
        ),
        (["--fail_above", "5"], "--fail_above: requires --baseline"),
        (["--reduce", "mean", "--inputs", "per_model"], "--reduce: mean requires --inputs shared"),
        (["--max_minutes", "0"], "expected a number of minutes above 0"),
        (["--resume", "no/such.json"], "--resume: no/such.json: expected a result file"),
        (["--baseline", KITTEN], f"--baseline: {KITTEN}: "),
        (["--from_json", KITTEN], "--from_json: cannot be combined with --image_path"),
        (
            ["--from_json", "a", "--threads", "2", "--roofline"],
            "with --image_path, --threads, --roof",
        ),
        (["--from_json", "a", "--precision", "5"], "with --image_path, --max_ci_percent"),
        (["--from_json", "a", "--dtype", "float32"], "with --image_path, --dtype: it shows"),
        (["--export_json", "/proc/run.json"], "--export_json: expected to write in /proc"),
        (["--arch", "vit_b_16", "--image_size", "64"], "--image_size: vit_b_16 does not run at 64"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0 to"),
        (["--seed", str(2**63)], "argument --seed: expected a whole number from 0 to"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--strategies", "magic"], "argument --strategies: invalid choice: 'magic'"),
        (["--model_path", "a", "b", "--num_models", "3"], "--num_models: expected 2, one per file"),
        (["--strategies", "vmpa"], "invalid choice: 'vmpa' (did you mean vmap?)"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--num_model", "3"], "unrecognized arguments: --num_model 3; did you mean --num_models?"),
        (["--num", "3"], "unrecognized arguments: --num 3"),
        (["--device", "tpu"], "--device: expected an available device (cpu"),
        (["--arch", "resnet19"], "got 'resnet19'"),
        (["--image_path", "no/such.jpg"], "no/such.jpg: expected an image file, but no such"),
        (["--model_path", "no/such.pth"], "no/such.pth: expected a checkpoint file, but no"),
        (["--export_json", "no/such/run.json"], "--export_json: expected a folder at no/such"),
        (["--export_json", "."], "--export_json: expected a file at ., got a directory"),
        (["--plot", "."], "--plot: expected a name that ends in .png or .svg, got ."),
        (["--plot", "./"], "--plot: expected a name that ends in .png or .svg, got ./"),
        (["--plot", "/"], "--plot: expected a name that ends in .png or .svg, got /"),
        (["--plot", "a/.."], "--plot: expected a name that ends in .png or .svg, got a/.."),
        (["--export_json", 300 * "a"], "--export_json: aaa"),
        (["--export_csv", f"{300 * 'a'}/run.csv"], "/run.csv: File name too long"),
        (["--export_markdown", 3000 * "a/"], "/: File name too long"),
        (["--plot", f"{249 * 'a'}.png"], "_grid.png: File name too long"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defaults = [] if "--image_path" in argv else ["--image_path", KITTEN]
    monkeypatch.setattr(pretrained, "published_url", lambda arch: "http://127.0.0.1:9/no.pth")
    assert message in error_of(capsys, *defaults, *argv)


def test_cuda_without_cuda_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--image_path", KITTEN, "--device", "cuda")
    assert "--device: expected an available device (cpu" in message
    assert "got 'cuda'" in message


def test_an_allocator_that_cannot_be_had_is_said_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    message = error_of(capsys, "--allocator", "retain")
    assert "retain is not available here: mallopt requires glibc" in message


def test_a_prefix_that_is_taken_off_a_checkpoint_is_printed(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lightning.ckpt"
    state = {f"model.{name}": tensor for name, tensor in torch.load(checkpoint).items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)
    config = parse(["--model_path", str(path), "--image_path", KITTEN])
    resnet_vmap.load(config, say=print)
    assert capsys.readouterr().out.startswith(
        f"Loading resnet model from {path}\n"
        f"{path}: stripped the prefix 'model.' from all 122 keys\n"
    )


def test_a_bad_checkpoint_leaves_the_output_of_an_earlier_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, bad = tmp_path / "run.json", tmp_path / "bad.pth"
    exports.save(Run(ENVIRONMENT, {}, (VMAP,)), {"json": str(earlier)})
    content = earlier.read_bytes()
    bad.write_text("<!DOCTYPE html>")
    argv = ["--image_path", KITTEN, "--model_path", str(bad), "--export_json", str(earlier)]
    assert "got an HTML page" in error_of(capsys, *argv)
    assert earlier.read_bytes() == content


@pytest.mark.parametrize("name", ["export_json", "export_csv", "export_markdown", "plot"])
def test_only_a_file_of_the_same_kind_is_replaced_unless_it_is_asked_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, target = tmp_path / "run.json", tmp_path / "target.png"
    exports.save(Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP)), {"json": str(saved)})
    argv = ["--from_json", str(saved), f"--{name}", str(target)]
    for content in ('{"name": "of another program"}', "# notes", "strategy\nnone"):
        target.write_text(content)
        assert resnet_vmap.main(argv) == 2
        message = f"error: --{name}: expected no file or an earlier output at"
        assert capsys.readouterr().err.startswith(message)
        assert target.read_text() == content
    assert resnet_vmap.main([*argv, "--overwrite"]) == 0
    own = target.read_bytes()
    assert resnet_vmap.main(argv) == 0
    assert target.read_bytes() == own
    target.write_text("")  # as mktemp makes it
    assert resnet_vmap.main(argv) == 0
    assert target.read_bytes() == own


@pytest.mark.parametrize("name", ["export_json", "export_csv", "export_markdown", "plot"])
def test_a_write_protected_file_is_replaced_only_if_it_is_asked_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, target = tmp_path / "run.json", tmp_path / "target.png"
    exports.save(Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP)), {"json": str(saved)})
    argv = ["--from_json", str(saved), f"--{name}", str(target)]
    assert resnet_vmap.main(argv) == 0
    target.chmod(0o444)
    before = target.stat().st_ino
    message = f"--{name}: expected a writable file at {target}, got a write-protected one; --overwr"
    assert message in error_of(capsys, *argv)
    assert target.stat().st_ino == before
    assert resnet_vmap.main([*argv, "--overwrite"]) == 0
    assert target.stat().st_ino != before
    assert target.stat().st_mode & 0o777 == 0o444


def test_a_write_protected_file_is_not_continued_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    exports.save(Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP)), {"json": str(path)})
    path.chmod(0o444)
    argv = ["--image_path", KITTEN, "--resume", str(path)]
    assert "got a write-protected one" in error_of(capsys, *argv)


def test_a_link_into_a_folder_that_is_missing_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "run.json"
    link.symlink_to(tmp_path / "gone" / "run.json")
    argv = ["--image_path", KITTEN, "--export_json", str(link)]
    message = f"--export_json: expected a folder at {tmp_path / 'gone'}, got none"
    assert message in error_of(capsys, *argv)
    (tmp_path / "gone").mkdir()
    parse(argv)


def test_a_link_into_a_folder_that_is_not_writable_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "run.json"
    link.symlink_to("/proc/run.json")
    argv = ["--image_path", KITTEN, "--export_json", str(link)]
    assert "--export_json: expected to write in /proc" in error_of(capsys, *argv)


def test_more_views_than_memory_holds_are_refused(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    argv = [*QUICK, "--model_path", checkpoint, "--batch_size", "1000000"]
    assert "--batch_size: " in error_of(capsys, *argv)


def test_all_strategies_give_a_row_each_and_what_cannot_run_here_is_no_failure(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = {name: STRATEGIES[name] for name in ("loop", "folded_vmap", "cudagraph_loop")}
    monkeypatch.setattr("ensemble.bench.report.show.STRATEGIES", cheap)
    monkeypatch.setattr("ensemble.bench.cli.STRATEGIES", cheap)
    assert resnet_vmap.main([*QUICK, "--model_path", checkpoint, "--strategies", "all"]) == 0
    out = capsys.readouterr().out
    for name in cheap:
        assert name in out
    assert "Not available here: cudagraph_loop: CUDA graphs require a CUDA device" in out


def test_a_strategy_that_was_named_and_cannot_run_here_ends_with_exit_code_1(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "cudagraph_loop"]
    assert resnet_vmap.main(argv) == 1
    assert "Not available here: cudagraph_loop: " in capsys.readouterr().out


def test_a_file_that_can_no_longer_be_written_costs_no_result(
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ensemble.bench.report.exports.write_atomically", full)
    argv = [*QUICK, "--model_path", checkpoint, "--export_json", str(tmp_path / "run.json")]
    assert resnet_vmap.main(argv) == 2
    captured = capsys.readouterr()
    assert "\n2 models: " in captured.out
    assert captured.err.endswith("run.json cannot be written: No space left on device\n")


def test_a_file_that_cannot_be_written_is_warned_of_once_and_tried_at_each_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = tmp_path / "run.json", [Run(ENVIRONMENT, {}, rows) for rows in ((LOOP,), (VMAP,))]
    room = iter([False, False, True, False, True, False])

    def now_and_then(path: Path, content: str) -> None:
        if not next(room):
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr("ensemble.bench.report.exports.write_atomically", now_and_then)
    files = show.Files(ReportOptions(export_json=str(path)))
    for run in (*runs, *runs):
        files.save(run)
    warning = f"Warning: {path} cannot be written: No space left on device; each later save tries"
    assert capsys.readouterr().err == f"{warning} again\n"
    with pytest.raises(InputError, match="cannot be written"):
        files.check()
    files.finish(runs[1])
    files.check()
    assert exports.read(str(path), argument="") == runs[1]
    files.finish(runs[0])
    with pytest.raises(InputError, match="cannot be written"):
        files.check()


def test_a_file_that_another_program_puts_there_meanwhile_is_named_without_an_argument(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.json"
    files = show.Files(ReportOptions(export_json=str(path)))
    path.write_text("of another program")
    files.finish(Run(ENVIRONMENT, {}, (LOOP,)))
    with pytest.raises(InputError, match=r"run\.json cannot be written: expected no file"):
        files.check()
    assert path.read_text() == "of another program"


def test_the_default_image_is_found_from_any_folder(
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resnet_vmap.main([*QUICK[2:], "--model_path", checkpoint]) == 0
    assert f"Loading image from {KITTEN}\n" in capsys.readouterr().out


def test_a_reader_that_stops_reading_gets_no_traceback(checkpoint: str) -> None:
    command = f"{sys.executable} resnet_vmap.py --model_path {checkpoint} --image_size 32 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"Loading resnet model from {checkpoint}\n"
    assert "Traceback" not in done.stderr


def test_outputs_that_disagree_end_with_exit_code_1_and_without_a_speedup(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble.bench.measure.tolerance_of", lambda numbers: -1.0)
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "vmap"]
    assert resnet_vmap.main(argv) == 1
    out = capsys.readouterr().out
    assert "vmap, 2 models: failed: outputs disagree: model " in out
    assert "Time taken for prediction with vmap: not measured" in out
    assert " times as fast" not in out


@pytest.mark.parametrize("argv", [["--help"], ["--num_models", "0"], ["--export_json", "/no/x"]])
def test_help_and_usage_errors_answer_without_importing_torch(argv: list[str]) -> None:
    program = (
        "import sys, resnet_vmap\n"
        "try: resnet_vmap.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("options", [["-P"], ["-I"]])
def test_the_script_finds_its_package_without_the_working_folder(
    options: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, *options, str(ROOT / "resnet_vmap.py"), "--list_strategies"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_a_package_that_is_not_installed_is_named(package: str) -> None:
    program = (
        "import sys\n"
        f"sys.modules['{package}'] = None\n"
        "import resnet_vmap\n"
        "sys.exit(resnet_vmap.main([]))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{package}.*\n", done.stderr), done.stderr


def test_libraries_that_cannot_be_mapped_are_one_line() -> None:
    command = f"ulimit -v 1500000; {sys.executable} resnet_vmap.py"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch("error: an installed package cannot be imported: .*\n", done.stderr)


def test_a_picture_needs_no_backend_of_matplotlib(tmp_path: Path) -> None:
    saved = ROOT / "tests" / "data"
    run = next(saved.rglob("*.json"))
    command = [sys.executable, "resnet_vmap.py", "--from_json", str(run)]
    command += ["--plot", str(tmp_path / "plot.png")]
    environment = {**os.environ, "MPLBACKEND": "nope"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "plot.png").exists()) == (0, True), done.stderr


def test_more_threads_than_cores_are_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "detect", lambda: Cores(4, 2, None))
    parse(["--threads", "2"])
    assert capsys.readouterr().err == ""
    parse(["--threads", "99"])
    assert capsys.readouterr().err.startswith(
        "Warning: --threads 99 is more than the cores here (2 of"
    )


def test_help_is_under_two_screens_and_says_each_default_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 95
    assert "(default: loop vmap best)" in out
    assert "(default: 0)" in out
    assert not re.search(
        r"default: None|default: False|default: \[|\(default[^()]*\) \(default", out
    )


def test_interrupted_the_program_keeps_and_shows_what_is_finished(
    checkpoint: str, tmp_path: Path
) -> None:
    target = tmp_path / "run.json"
    argv = ["--model_path", checkpoint, "--image_size", "32", "--export_json", str(target)]
    argv += ["--strategies", "loop", "vmap", "--min_seconds", "1", "--min_pairs", "100000"]
    argv += ["--processes", "0"]
    argv += ["--num_models", "1", "--threads", "1"]
    ended = signaled(argv, signal.SIGINT, at="loop, 1 model: timing")
    assert ended.code == 130
    assert "interrupted: 0 of 2 rows are finished" in ended.err
    assert "Traceback" not in ended.err
    assert "Nothing was compared with the loop." in ended.out
    assert not target.exists()


def test_a_real_lack_of_memory_fails_its_row_with_advice_and_keeps_the_earlier_ones(
    checkpoint: str,
) -> None:
    """With 25 MB of address space left, vmap over 4 models at batch 8 does not fit."""
    program = (
        "import resource, sys, torch, functorch, torchvision, resnet_vmap\n"
        "from ensemble.bench.executors import in_process\n"
        "measured = in_process.measure\n"
        "def measure(task, *rest, **options):\n"
        "    if task.case.strategy == 'vmap':\n"
        "        now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (now + 25_000_000, -1))\n"
        "    return measured(task, *rest, **options)\n"
        "in_process.measure = measure\n"
        "sys.exit(resnet_vmap.main(sys.argv[1:]))"
    )
    argv = ["--model_path", checkpoint, "--num_models", "4", "--batch_size", "8"]
    argv += ["--image_size", "64", "--warmup", "0", "--min_pairs", "1", "--min_seconds", "0"]
    argv += ["--processes", "0", "--threads", "1", "--strategies", "loop", "vmap"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"vmap, 4 models: failed: out of memory with 4 models; (not even 1|[12]) would fit",
        done.stdout,
    ), done.stdout
    assert "1 (reference)" in done.stdout


def rows_of(path: Path) -> list[Case]:
    return [row.case for row in exports.read(str(path), argument="").results]


def test_a_sweep_stopped_and_resumed_has_the_rows_of_one_that_was_not(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    argv = [*QUICK, "--model_path", checkpoint, "--num_models", "1", "2"]
    assert resnet_vmap.main([*argv, "--export_json", str(whole)]) == 0
    argv += ["--max_minutes", "1e-6"]
    assert resnet_vmap.main([*argv, "--export_json", str(part)]) == 0
    captured = capsys.readouterr()
    unmeasured = "not measured, or by fewer processes than requested: vmap, 1 model; "
    assert f"1 of 4 rows are finished; {unmeasured}" in captured.err
    assert rows_of(part) == rows_of(whole)[:1]
    first = exports.read(str(part), argument="").results
    assert resnet_vmap.main([*argv[:-2], "--resume", str(part)]) == 0
    assert "3 of 4 rows are missing" in capsys.readouterr().out
    assert rows_of(part) == rows_of(whole)
    assert exports.read(str(part), argument="").results[:1] == first


@pytest.fixture(scope="module")
def finished_run(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole run of the loop."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "loop", "--export_json", str(path)]
    assert resnet_vmap.main(argv) == 0
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environment": {"cores": 99}}, "--resume: expected a result file of this machine, got"),
        ({"environment": {"torch": "1.0"}}, "--resume: expected the settings of"),
        ({"config": {"seed": 9}}, "got seed: 0, was 9"),
        ({"config": {"processes": 5}}, "got processes: 0, was 5"),
    ],
)
def test_a_run_of_another_machine_version_or_setting_is_not_resumed(
    change: dict[str, Any],
    message: str,
    checkpoint: str,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.json"
    document = json.loads(finished_run.read_text())
    for part, values in change.items():
        document[part] |= values
    path.write_text(json.dumps(document))
    before = path.read_bytes()
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "loop", "--resume", str(path)]
    assert resnet_vmap.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Running Sample prediction" not in captured.out
    assert path.read_bytes() == before


def with_steady_times(run: Run, time_s: float = 0.9) -> Run:
    """The run with made-up times, whatever the machine made of the real ones."""
    rows = [
        changed(
            row,
            times_s=(1.0 if row.case.is_reference else time_s,) * 8,
            reference_times_s=() if row.case.is_reference else (1.0,) * 8,
            others_cpu_share=0.0,
        )
        for row in run.results
    ]
    return replace(run, results=tuple(rows))


def test_a_saved_run_is_shown_drawn_and_compared_without_torch(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    argv = [
        *QUICK,
        "--model_path",
        checkpoint,
        "--num_models",
        "1",
        "2",
        "--image_size",
        "32",
        "40",
    ]
    assert resnet_vmap.main([*argv, "--export_json", str(path)]) == 0
    run = with_steady_times(exports.read(str(path), argument=""))
    exports.save(run, {"json": str(path)})
    names = {form: tmp_path / f"again.{form}" for form in ("json", "csv", "md", "png")}
    argv = ["--from_json", str(path), "--baseline", str(path), "--fail_above", "5"]
    argv += ["--export_json", str(names["json"]), "--export_csv", str(names["csv"])]
    argv += ["--export_markdown", str(names["md"]), "--plot", str(names["png"])]
    program = (
        "import sys, resnet_vmap; code = resnet_vmap.main(sys.argv[1:]);"
        " assert not {'torch', 'torchvision', 'functorch', 'numba'} & set(sys.modules);"
        " sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == show.INCONCLUSIVE, done.stderr  # one process a row
    capsys.readouterr()
    show.show(run, verbose=parse(argv).report.verbose)
    assert done.stdout.startswith(capsys.readouterr().out)
    assert "vmap, 2 models, batch 1, 40 px, float32: time relative to the loop is 1.000x" in (
        done.stdout
    )
    assert names["json"].read_text() == path.read_text()
    assert (tmp_path / "again_grid.png").exists()
    assert all(file.stat().st_size for file in names.values())


def test_a_strategy_that_is_significantly_slower_than_its_baseline_ends_with_exit_code_1(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    argv = [*QUICK, "--model_path", checkpoint, "--num_models", "1"]
    assert resnet_vmap.main([*argv, "--export_json", str(new)]) == 0
    run = exports.read(str(new), argument="")
    for path, time_s in ((new, 0.9), (old, 0.1)):
        exports.save(with_steady_times(run, time_s), {"json": str(path)})
    argv = ["--from_json", str(new), "--baseline", str(old)]
    assert resnet_vmap.main(argv) == 0
    assert "significantly slower" in capsys.readouterr().out
    assert resnet_vmap.main([*argv, "--fail_above", "10"]) == 1
    assert resnet_vmap.main([*argv, "--fail_above", "5000"]) == 0
    busy = with_steady_times(run, 0.1)
    rows = [changed(row, others_cpu_share=1.01) for row in busy.results]
    exports.save(replace(busy, results=tuple(rows)), {"json": str(new)})
    assert resnet_vmap.main([*argv, "--fail_above", "10"]) == 3  # neither passed nor failed
    assert "Inconclusive for --fail_above 10: vmap, 1 model" in capsys.readouterr().out
    loop_alone = replace(run, results=run.results[:1])
    exports.save(loop_alone, {"json": str(old)})
    assert resnet_vmap.main(argv) == 0
    assert resnet_vmap.main([*argv, "--fail_above", "10"]) == 2  # it judges nothing
    assert "there is nothing to compare" in capsys.readouterr().err


def test_a_baseline_without_a_row_of_the_run_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    here = workload.load(parse(QUICK), say=lambda line: None)
    environment = here.describe(parse(QUICK), first_forward_s=1.0)
    exports.save(Run(environment, {}, (changed(VMAP, image_size=999),)), {"json": str(path)})
    assert resnet_vmap.main([*QUICK, "--baseline", str(path)]) == 2
    captured = capsys.readouterr()
    assert f"--baseline: expected a row of this run in {path}" in captured.err
    assert "Serving multiple models" not in captured.out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--target_qps", "9"], "--target_qps: requires --scenario"),
        (["--strategies", "hybrid"], "--strategies: hybrid requires --scenario"),
        (["--scenario", "server", "--target_qps", "0"], "requests per second above 0, got '0'"),
        (["--scenario", "server", "--latency_bound_ms", "-1"], "milliseconds above 0, got '-1'"),
        (["--scenario", "server", "--latency_percentile", "100"], "from 50 to 99.9, got '100'"),
        (["--scenario", "server", "--skew", "nan"], "from 0 to 10, got 'nan'"),
        (["--scenario", "server", "--skew", "1"], "--skew: requires --inputs per_model"),
        (["--scenario", "server", "--strategies", "hybrid"], "hybrid requires --inputs per_model"),
        (
            ["--scenario", "offline", "--target_qps", "9"],
            "requires --scenario server, got",
        ),
        (
            ["--scenario", "server", "--batch_size", "2"],
            "--batch_size: cannot be combined with",
        ),
        (["--scenario", "server", "--load_log", KITTEN], "--load_log: expected a folder, got"),
        (
            ["--scenario", "server", "--load_log", f"{KITTEN}/a/b"],
            f"--load_log: expected a folder, got a file at {KITTEN}",
        ),
        (["--scenario", "server", "--load_log", "/proc/logs/a"], "expected to write in /proc"),
        (["--scenario", "server", "--load_log", 300 * "a"], "aaa: File name too long"),
    ],
)
def test_load_that_makes_no_sense_is_one_clear_line(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(capsys, *argv)


def test_without_loadgen_the_error_names_the_requirements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ensemble.bench.cli.find_spec", lambda name: None)
    assert "requirements-peers.txt" in error_of(capsys, "--scenario", "server")


def test_the_default_comparison_has_a_cuda_graph_of_the_loop_on_cuda_only() -> None:
    default = ("loop", "vmap", "best")
    assert parse([]).run.strategies == parse([]).on("cpu").run.strategies == default
    on_cuda = parse([]).on("cuda").for_architecture(None)
    assert on_cuda.run.strategies == ("loop", "vmap", "cudagraph_loop", "best")
    assert [case.strategy for case in on_cuda.plan()] == ["loop", "vmap", "cudagraph_loop", "best"]
    assert on_cuda.on("cuda") == config_of(on_cuda.plain()).on("cuda") == on_cuda
    named = parse(["--strategies", *default])
    assert named.on("cuda").run.strategies == default


def test_a_run_on_cuda_is_planned_for_cuda() -> None:
    class PlannedError(Exception):
        pass

    class OnCuda(workload.Workload):
        def describe(self, config: Config, *, first_forward_s: float) -> NoReturn:
            raise PlannedError(config.run.strategies)

    def load(config: Config, *, say: object) -> OnCuda:
        return OnCuda(torch.device("cuda"), (), "none", lambda px: torch.empty(0))

    with pytest.raises(PlannedError, match="cudagraph_loop"):
        resnet_vmap.run(parse([]), load)


def test_flushing_the_l2_cache_requires_cuda_and_one_process_without_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--image_path", KITTEN, "--flush_l2", "--device", "cpu"]
    assert "--flush_l2: requires a CUDA device, got cpu" in error_of(capsys, *argv)
    under_load = error_of(capsys, *argv, "--scenario", "offline")
    assert "--flush_l2: cannot be combined with --scenario" in under_load
    monkeypatch.setattr("ensemble.machine.launch.is_launched", lambda: True)
    with pytest.raises(InputError, match="cannot be combined with torchrun"):
        parse(argv)
