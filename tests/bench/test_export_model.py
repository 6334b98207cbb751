"""`--export_model`: the file, its row, and one line for everything that is wrong."""

from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_vmap
from ensemble.bench.cli import parse
from ensemble.errors import InputError
from ensemble.models.vision import torchvision
from tests.tiny import independent

KITTEN = str(Path(resnet_vmap.__file__).parent / "kitten.jpg")
QUICK = ["--image_path", KITTEN, "--image_size", "32", "--warmup", "0", "--min_pairs", "8"]
QUICK += ["--min_seconds", "0", "--processes", "0", "--strategies", "loop"]
pytestmark = pytest.mark.usefixtures("tests_beside_each_other")


def run(checkpoints: dict[str, nn.Module], *flags: str) -> int:
    return resnet_vmap.main(
        [*QUICK, "--arch", "mobilenet_v3_small", "--model_path", *checkpoints, *flags]
    )


def test_a_run_leaves_the_models_of_the_checkpoints_at_the_path_and_says_what_it_costs(
    checkpoints: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "winner.pt2"
    assert run(checkpoints, "--export_model", str(path)) == 0
    call, x = torch.export.load(path).module(), torch.randn(3, 3, 32, 32)
    expected = independent(list(checkpoints.values()), x)
    torch.testing.assert_close(call(x), expected, rtol=1e-3, atol=1e-4)
    shown = capsys.readouterr().out
    row, said = (
        line for line in shown.splitlines() if "exported_pt2  " in line or str(path) in line
    )
    assert row.startswith("exported_pt2")
    assert said.startswith(f"{path}: 2 models, any batch size, ")
    assert "run by torch alone it is within" in said
    assert "winner.pt2 runs at " in said
    assert [each.name for each in tmp_path.iterdir()] == ["winner.pt2"]


def test_the_first_dtype_and_per_model_inputs_are_those_of_the_file(
    checkpoints: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "all.pt2"
    flags = ["--dtype", "bfloat16", "--inputs", "per_model", "--batch_size", "2"]
    assert run(checkpoints, "--export_model", str(path), *flags) == 0
    found = torch.export.load(path).module()(torch.randn(2, 4, 3, 32, 32, dtype=torch.bfloat16))
    assert (found.shape, found.dtype) == ((2, 4, 10), torch.bfloat16)


def test_models_that_cannot_be_exported_end_with_exit_code_1_and_the_reason(
    checkpoints: dict[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = torchvision.models.MobileNetV3.forward

    def branching(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x if x.max() > 0 else -x)

    monkeypatch.setattr(torchvision.models.MobileNetV3, "forward", branching)
    path = tmp_path / "all.pt2"
    assert run(checkpoints, "--export_model", str(path)) == 1
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error")]
    assert line.startswith("error: --export_model: torch.export cannot trace these models: ")
    assert "Not available here: exported_pt2: torch.export cannot trace" in shown.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--export_model", "x.pt"], "expected a name that ends in .pt2 (torch.export), .aoti.pt2"),
        (["--export_model", "missing/x.pt2"], "expected a folder at "),
        (
            ["--export_model", "x.pt2", "--num_models", "1", "2"],
            "requires one --num_models, got 1 2",
        ),
        (["--export_model", "x.pt2", "--image_size", "32", "64"], "requires one --image_size"),
        (
            ["--export_model", "x.pt2", "--scenario", "offline"],
            "cannot be combined with --scenario",
        ),
        (["--export_model", "x.pt2", "--export_csv", "x.pt2"], "expected a separate file, got"),
        (["--export_model", ""], "expected a value, got an empty one"),
    ],
)
def test_a_path_or_flag_that_does_not_go_with_it_is_an_error_before_the_run(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        parse(["--image_path", KITTEN, *flags])
    assert caught.value.argument == "export_model"
    assert message in caught.value.message


def test_another_file_is_replaced_with_overwrite_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"precious")
    flags = ["--image_path", KITTEN, "--export_model", str(tmp_path / "x.onnx")]
    assert resnet_vmap.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --export_model: expected an earlier file of this kind at ")
    assert error.count("\n") == 1
    assert parse([*flags, "--overwrite"]).run.strategies[-1] == "exported_onnx"


def test_the_row_of_a_format_is_compared_once() -> None:
    for path, strategy in {
        "a.pt2": "exported_pt2",
        "a.aoti.pt2": "exported_aoti",
        "a.onnx": "exported_onnx",
        "triton_repository/": "exported_onnx",
    }.items():
        flags = ["--image_path", KITTEN, "--export_model", path, "--strategies", "loop", strategy]
        assert parse(flags).run.strategies == ("loop", strategy)
