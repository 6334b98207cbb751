"""Tests of the autotuner of tiles, with planted times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemble.compiler.cuda import launch
from ensemble.compiler.cuda.problem import ConvProblem
from ensemble.compiler.cuda.tiles import Tile, candidate_tiles
from ensemble.compiler.cuda.tuning import TileTuner
from ensemble.compiler.planning.shape_inference import conv_geometry

CPU = torch.device("cpu")
X = torch.empty(1, 64, 28, 28, device="meta")
PROBLEM = ConvProblem(2, conv_geometry(X, 64, (3, 3), (1, 1), (1, 1), (1, 1)), torch.float32)
TILES = candidate_tiles(PROBLEM, launch.limits_of(CPU))


def never_run(tile: Tile) -> Tensor:
    raise AssertionError


def timed(times: dict[Tile, float]) -> Callable[..., float]:
    """Planted times; a tile without one fails."""

    def time_tile(run: object, tile: Tile) -> float:
        if tile not in times:
            raise RuntimeError(f"out of resource: {tile}")
        return times[tile]

    return time_tile


def test_the_fastest_tile_is_selected_and_found_again_on_disk(tmp_path: Path) -> None:
    times = dict.fromkeys(TILES, 2.0) | {TILES[-1]: 1.0}
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed(times))
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[-1]
    again = TileTuner(0.0, folder=tmp_path, time_tile=timed({}))
    assert again.select(PROBLEM, CPU, never_run) == TILES[-1]
    assert (tuner.skipped, again.skipped) == (0, 0)


def test_another_problem_is_tuned_anew(tmp_path: Path) -> None:
    TileTuner(60.0, folder=tmp_path, time_tile=timed(dict.fromkeys(TILES, 1.0))).select(
        PROBLEM, CPU, never_run
    )
    other = ConvProblem(3, PROBLEM.geometry, PROBLEM.dtype)
    tiles = candidate_tiles(other, launch.limits_of(CPU))
    times = dict.fromkeys(tiles, 2.0) | {tiles[1]: 1.0}
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed(times))
    assert tuner.select(other, CPU, never_run) == tiles[1]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"block_m": 1}', json.dumps(dict.fromkeys(Tile.__annotations__, 7))]
)
def test_a_damaged_file_is_tuned_anew(tmp_path: Path, content: str) -> None:
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed(dict.fromkeys(TILES, 1.0)))
    tuner.select(PROBLEM, CPU, never_run)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    times = dict.fromkeys(TILES, 2.0) | {TILES[1]: 1.0}
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed(times))
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[1]


def test_after_the_budget_the_default_tile_is_taken_untimed(tmp_path: Path) -> None:
    clock = iter([0.0, 61.0]).__next__
    tuner = TileTuner(60.0, folder=tmp_path, clock=clock, time_tile=timed({}))
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[0]
    assert tuner.skipped == 1
    assert not list(tmp_path.iterdir())


def test_a_tile_that_fails_is_not_selected_and_reported(tmp_path: Path) -> None:
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed({TILES[1]: 1.0}))
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[1]
    assert len(tuner.errors) == len(TILES) - 1
    assert tuner.errors[0].startswith("out of resource")


def test_if_no_tile_runs_the_error_of_the_default_one_is_raised(tmp_path: Path) -> None:
    tuner = TileTuner(60.0, folder=tmp_path, time_tile=timed({}))
    with pytest.raises(RuntimeError, match=rf"out of resource: Tile\(block_m={TILES[0].block_m}"):
        tuner.select(PROBLEM, CPU, never_run)


def test_a_folder_that_cannot_be_written_costs_no_tile(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "tiles"
    tuner = TileTuner(60.0, folder=folder, time_tile=timed({TILES[1]: 1.0}))
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[1]


def test_without_a_gpu_nothing_is_timed(tmp_path: Path) -> None:
    tuner = TileTuner(60.0, folder=tmp_path)
    assert tuner.select(PROBLEM, CPU, never_run) == TILES[0]
