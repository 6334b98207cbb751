"""`--save`: the fastest strategy that can be saved, and one line for everything that is wrong."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ensemble
import resnet_vmap
from ensemble.bench.cli import parse
from ensemble.bench.save_winner import fastest_first
from ensemble.bench.summary import Summary
from ensemble.errors import InputError
from tests.made import LOOP, VMAP, changed
from tests.tiny import independent

KITTEN = str(Path(resnet_vmap.__file__).parent / "kitten.jpg")
QUICK = ["--image_path", KITTEN, "--image_size", "32", "--warmup", "0", "--min_pairs", "8"]
QUICK += ["--min_seconds", "0", "--processes", "0", "--arch", "mobilenet_v3_small"]
pytestmark = pytest.mark.usefixtures("tests_beside_each_other")


def run(checkpoints: dict[str, nn.Module], *flags: str) -> int:
    return resnet_vmap.main([*QUICK, "--model_path", *checkpoints, *flags])


def test_a_run_leaves_the_fastest_strategy_with_a_plan_for_each_batch_size(
    checkpoints: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "winner.ensemble"
    flags = ["--strategies", "loop", "lowered_vmap", "--batch_size", "1", "3"]
    assert run(checkpoints, *flags, "--save", str(path)) == 0
    forward = ensemble.load(path)
    assert (forward.strategy, forward.max_batch, forward.num_models) == ("lowered_vmap", 3, 2)
    for batch_size in (1, 3):
        x = torch.randn(batch_size, 3, 32, 32)
        expected = independent(list(checkpoints.values()), x)
        torch.testing.assert_close(forward(x), expected, rtol=1e-3, atol=1e-4)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
    assert said.startswith(f"{path}: 2 models by lowered_vmap, ")
    assert f'forward = ensemble.load("{path}") starts it without tuning' in said


def test_the_dtype_of_the_winner_is_that_of_the_file(
    checkpoints: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "winner.ensemble"
    flags = ["--strategies", "folded_loop", "--dtype", "bfloat16", "--inputs", "per_model"]
    assert run(checkpoints, *flags, "--save", str(path)) == 0
    forward = ensemble.load(path)
    assert (forward.dtype, forward.shape) == (torch.bfloat16, (2, 1, 3, 32, 32))


def test_a_winner_that_cannot_be_saved_is_named_and_the_next_one_is_saved(
    checkpoints: dict[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ensemble.bench import save_winner

    def slowest_last(results: list[Summary]) -> list[Summary]:
        order = ["chunked_vmap", "loop"]
        return sorted(results, key=lambda row: order.index(row.case.strategy))

    monkeypatch.setattr(save_winner, "fastest_first", slowest_last)
    from ensemble.strategies import saved_run

    def refuse(*arguments: object) -> None:
        raise ensemble.UnavailableError("this forward cannot be saved: a reason")

    monkeypatch.setattr(saved_run, "of_vmapped", refuse)
    path = tmp_path / "winner.ensemble"
    flags = ["--strategies", "loop", "chunked_vmap", "--save", str(path)]
    assert run(checkpoints, *flags) == 0
    assert ensemble.load(path).strategy == "loop"
    shown = capsys.readouterr().out
    assert "The fastest, chunked_vmap, cannot be saved: chunked_vmap: this forward" in shown


def test_without_a_strategy_that_can_be_saved_the_exit_code_is_1(
    checkpoints: dict[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ensemble.strategies import saved_run

    def refuse(*arguments: object) -> None:
        raise ensemble.UnavailableError("this forward cannot be saved: a reason")

    monkeypatch.setattr(saved_run, "of_modules", refuse)
    flags = ["--strategies", "loop", "--save", str(tmp_path / "winner.ensemble")]
    assert run(checkpoints, *flags) == 1
    assert "error: --save: loop: this forward cannot be saved: a reason\n" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save", "missing/x.ensemble"], "expected a folder at "),
        (["--save", "x", "--num_models", "1", "2"], "requires one --num_models, got 1 2"),
        (["--save", "x", "--image_size", "32", "64"], "requires one --image_size, got 32 64"),
        (["--save", "x", "--scenario", "offline"], "cannot be combined with --scenario"),
        (["--save", "x", "--export_csv", "x"], "expected a separate file, got --export_csv x"),
        (["--save", "x.pt2", "--export_model", "x.pt2"], "expected a separate file, got"),
        (["--save", "other"], "expected an earlier file of this kind at "),
        (["--save", "."], "expected a file at "),
        (["--save", ""], "expected a value, got an empty one"),
    ],
)
def test_a_path_or_flag_that_does_not_go_with_it_is_an_error_before_the_run(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_bytes(b"precious")
    with pytest.raises(InputError) as caught:
        parse(["--image_path", KITTEN, *flags])
    assert caught.value.argument == "save"
    assert message in caught.value.message


def test_the_fastest_row_of_the_first_grid_point_comes_first() -> None:
    faster = changed(VMAP, strategy="lowered_vmap", times_s=(0.01,) * 20)
    elsewhere = changed(faster, batch_size=8)
    found = fastest_first([LOOP, VMAP, faster, elsewhere])
    assert [each.case.strategy for each in found] == ["lowered_vmap", "vmap", "loop"]
    assert fastest_first([]) == []
