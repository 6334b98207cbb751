"""Runs of models that are no ImageNet classifiers: functions of the user, other channels, other
outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_vmap
from ensemble.bench.report import exports
from ensemble.bench.summary import Run
from ensemble.models.vision import torchvision
from tests import user_models
from tests.models.test_architectures import FakeTimm, new, saved

ROOT = Path(resnet_vmap.__file__).parent
FILE = user_models.__file__
QUICK = ["--image_size", "32", "--warmup", "0", "--min_pairs", "6", "--min_seconds", "0"]
QUICK += ["--num_models", "2", "--strategies", "loop", "vmap", "--threads", "1"]


@pytest.fixture(autouse=True)
def wide_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")


def run(tmp_path: Path, *argv: str) -> Run:
    """The results of a run in this process, in which no row may fail."""
    target = str(tmp_path / "run.json")
    options = [*QUICK, "--processes", "0", "--export_json", target, "--overwrite"]
    assert resnet_vmap.main([*options, *argv]) == 0
    found = exports.read(target, argument="")
    assert [row.status for row in found.results] == ["ok", "ok"]
    assert all((row.max_rel_error or 0) < 1e-4 for row in found.results)
    return found


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 2 before it measures."""
    capsys.readouterr()
    assert resnet_vmap.main([*QUICK, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Serving multiple models" not in captured.out
    return captured.err.removeprefix("error: ").rstrip()


def test_a_classifier_of_one_channel_with_weights_predicts_what_its_module_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = new(user_models.gray, 1)
    path = saved(model, tmp_path / "gray.pth")
    argv = ["--arch", f"{FILE}:gray", "--channels", "1", "--model_path", str(path)]
    argv += ["--image_path", str(ROOT / "kitten.jpg"), "--image_mean", "0.5", "--image_std", "0.25"]
    found = run(tmp_path, *argv)
    out = capsys.readouterr().out
    from PIL import Image

    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(37),
            torchvision.transforms.CenterCrop(32),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.5], [0.25]),
        ]
    )
    x = transform(Image.open(ROOT / "kitten.jpg").convert("L"))
    with torch.no_grad():
        expected = model(x[None])[0].softmax(0)
    assert f"Loading {FILE}:gray from {path}\n" in out
    assert "Converted image to shape torch.Size([1, 1, 32, 32])\n" in out
    assert "Preprocessing: mean 0.5, std 0.25, crop 0.875, bilinear\n" in out
    label, share = int(expected.argmax()), float(expected.max())
    assert f"Prediction: class {label}, probability {share:.3f}\n" in out
    assert found.environment.preprocessing == "mean 0.5, std 0.25, crop 0.875, bilinear"
    assert found.results[0].top1 == [[label], [label]]
    assert [row.top1_agreement for row in found.results] == [1.0, 1.0]


def test_images_of_other_channels_are_synthetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--arch", f"{FILE}:many_channels", "--channels", "13", "--seed", "4")
    out = capsys.readouterr().out
    assert "Generating synthetic images of 13 channels, seed 4\n" in out
    assert "Generated image of shape torch.Size([1, 13, 32, 32])\n" in out
    assert f"the weights of {FILE}:many_channels are as constructed, seeds 4 to 5\n" in out
    assert found.config["image_path"] is None
    assert found.results[1].top1_agreement == 1.0


@pytest.mark.parametrize(
    ("function", "shape", "more"),
    [
        ("segmenter", "(4, 32, 32)", ()),
        ("segmenter", "(4, 32, 32)", ("--reduce", "mean", "--batch_size", "3")),
        ("segmenter", "(4, 32, 32)", ("--inputs", "per_model", "--batch_size", "2")),
        ("Embedder", "(8,)", ("--reduce", "mean")),
        ("Regressor", "()", ()),
        ("named_tuple", "(8,)", ("--output", "features")),
    ],
)
def test_outputs_without_classes_are_compared_by_value_and_have_no_top_1(
    function: str,
    shape: str,
    more: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(tmp_path, "--arch", f"{FILE}:{function}", *more)
    assert f"Prediction: output of shape {shape}\n" in capsys.readouterr().out
    document = json.loads((tmp_path / "run.json").read_text())
    assert [(row["top1"], row["top1_agreement"]) for row in document["results"]] == [
        (None,) * 2
    ] * 2
    assert all(one.top1 is None for row in found.results for one in row.measurements)


def test_the_named_output_of_a_tuple_has_classes_if_it_is_the_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = ["--arch", f"{FILE}:named_tuple"]
    by_name, by_index = (run(tmp_path, *arch, "--output", one) for one in ("logits", "0"))
    assert by_name.results[0].top1 == by_index.results[0].top1 is not None
    assert by_name.config["output"] == "logits"
    message = (
        "--output: expected the name or index of a tensor, as the model gives Output of logits"
    )
    assert error_of(capsys, *arch) == f"{message} (1, 7), features (1, 8)"
    wrong = "--output: expected the name or index of a tensor, got 2, but the model gives Output of"
    assert error_of(capsys, *arch, "--output", "2").startswith(wrong)
    one = "--output: expected none, got 0, but the model gives one tensor (1, 4, 32, 32)"
    assert error_of(capsys, "--arch", f"{FILE}:segmenter", "--output", "0") == one


def test_a_strategy_whose_segmentation_is_wrong_at_one_pixel_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(
        "import torch\n"
        "def build(models, example):\n"
        "    def forward(x):\n"
        "        outputs = torch.stack([model(x) for model in models])\n"
        "        outputs[1, 0, 2, 5, 7] += 0.01\n"
        "        return outputs\n"
        "    return forward\n"
    )
    for reduce in ("none", "mean"):
        argv = [*QUICK, "--processes", "0", "--arch", f"{FILE}:segmenter", "--reduce", reduce]
        assert resnet_vmap.main([*argv, "--strategies", "loop", f"{tmp_path}/wrong.py:build"]) == 1
        out = capsys.readouterr().out
        assert "failed: outputs disagree: model 1 has an error of" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--arch", "nothing.py:make"],
            f"--arch: expected a file at {os.getcwd()}/nothing.py, got",
        ),
        (["--arch", f"{FILE}:grey"], f"--arch: expected a function grey in {FILE}, got none"),
        (
            ["--arch", f"{FILE}:raises"],
            f"--arch: {FILE}:raises failed: KeyError: 'no weights here'",
        ),
        (["--arch", FILE], f"--arch: expected PATH.py:FUNCTION, got {FILE}"),
        (
            ["--arch", f"{FILE}:gray"],
            f"--channels: {FILE}:gray does not take images of 3 channels: Given groups=1",
        ),
        (
            ["--arch", f"{FILE}:many_channels", "--channels", "1"],
            f"--channels: {FILE}:many_channels does not take images of 1 channel: Given groups=1",
        ),
        (
            ["--channels", "4", "--image_path", str(ROOT / "kitten.jpg")],
            "--image_path: expected none with --channels 4, whose images are synthetic, got",
        ),
        (
            ["--channels", "4", "--image_mean", "1", "2", "3"],
            "--image_mean: expected one value or 4, one per channel, got 3",
        ),
        (
            ["--channels", "1", "--image_std", "1", "2"],
            "--image_std: expected one value, got 2",
        ),
        (
            ["--image_std", "0"],
            "argument --image_std: expected a number above 0, below 1e6, got '0'",
        ),
        (["--image_std", "nan"], "argument --image_std: expected a number above 0, below 1e6, got"),
        (["--image_mean", "inf"], "argument --image_mean: expected a number between -1e6 and 1e6"),
        (["--channels", "0"], "argument --channels: expected a whole number from 1 to 1024, got"),
        (["--output", ""], "--output: expected a value, got an empty one"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *argv).startswith(message)


def test_a_model_that_fails_with_an_error_of_its_own_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing.py").write_text(
        "import torch\n"
        "class Failing(torch.nn.Module):\n"
        "    def forward(self, x): return self.missing(x)\n"
    )
    arch = f"{tmp_path}/failing.py:Failing"
    message = f"--image_size: {arch} does not run at 32 px: AttributeError: 'Failing' object has no"
    assert error_of(capsys, "--arch", arch).startswith(message)


def test_timms_own_size_and_preprocessing_are_used_unless_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm("timm"))
    target = str(tmp_path / "run.json")
    at = QUICK.index("--image_size")
    without_size = QUICK[:at] + QUICK[at + 2 :]
    for more, size, mean in (([], 48, "0.5"), (["--image_size", "40"], 40, "0.1")):
        argv = [*without_size, "--processes", "0", "--export_json", target, "--overwrite"]
        argv += ["--image_mean", "0.1"] if more else []
        assert resnet_vmap.main([*argv, "--arch", "timm/tiny", *more]) == 0
        found = exports.read(target, argument="")
        assert {row.case.image_size for row in found.results} == {size}
        assert found.config["image_size"] == [size]
        assert found.environment.preprocessing == f"mean {mean}, std 0.25, crop 0.9, bicubic"
        out = capsys.readouterr().out
        assert "No --model_path: the weights of timm/tiny are random, seeds 0 to 1\n" in out


@pytest.mark.parametrize("arch", ["mine.py:local_class", "mine:local_class"])
def test_workers_construct_what_pickle_does_not_support_from_a_relative_name(
    arch: str, tmp_path: Path
) -> None:
    moves = "import os\nos.chdir('/')\n" if ".py:" in arch else ""
    (tmp_path / "mine.py").write_text(f"{Path(FILE).read_text()}\n{moves}")
    path = saved(new(user_models.local_class, 2), tmp_path / "weights.pth")
    argv = [*QUICK, "--processes", "1", "--arch", arch, "--model_path", str(path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "resnet_vmap.py"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Prediction: output of shape (4, 32, 32)\n" in done.stdout
    assert "\nvmap " in done.stdout
