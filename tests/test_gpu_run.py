"""Tests of the prepared run on a GPU: dry, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import gpu_run
from tests.studies import cuda

ROOT = Path(__file__).parents[1]


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu_run", "--dry", "--out", str(folder), *options]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    log = (folder / "gpu_run.log").read_text() if (folder / "gpu_run.log").exists() else ""
    assert not answer.returncode, answer.stdout + answer.stderr + log
    return [json.loads(line) for line in (folder / gpu_run.LINES).read_text().splitlines()]


def test_a_step_adds_lines_as_it_goes_and_how_it_ended(tmp_path: Path) -> None:
    lines = run(tmp_path, "--steps", "state", "ceilings")
    assert [line["dtype"] for line in lines if "limits" in line] == ["bfloat16", "float32"]
    ended = [(line["step"], line["status"]) for line in lines if "status" in line]
    assert ended == [("state", "ok"), ("ceilings", "ok")]


def test_steps_after_the_time_of_the_run_are_skipped(tmp_path: Path) -> None:
    (line,) = run(tmp_path, "--steps", "state", "--seconds", "1")
    assert line["status"] == "skipped: the time of the run is over"


def test_what_a_step_has_measured_survives_its_end(tmp_path: Path) -> None:
    lines = run(tmp_path, "--steps", "strategies", "--seconds", "7.5")
    assert lines[-1]["status"] in ("out of time", "ok")


def test_models_of_a_format_are_not_rounded_by_the_one_before(tmp_path: Path) -> None:
    context = gpu_run.Context(tmp_path, is_dry=True, deadline=0.0)
    gpu_run._models(context, 1, "bfloat16")
    (model,), x = gpu_run._models(context, 1, "float32")
    weight = next(model.parameters())
    assert weight.dtype == x.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_a_command_is_interrupted_before_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "try:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('what was found')"
    )
    context = gpu_run.Context(tmp_path, is_dry=True, deadline=time.time() + 10)
    gpu_run._command(context, "tests", "kernels", [sys.executable, "-c", program])
    line = json.loads((tmp_path / gpu_run.LINES).read_text())
    assert line["output"].endswith("what was found")
    assert line["exit_code"] == 0


@pytest.mark.slow
def test_every_step_runs_dry_and_the_page_shows_it(tmp_path: Path) -> None:
    lines = run(tmp_path, "--seconds", "3000")
    ended = {line["step"]: line["status"] for line in lines if "status" in line}
    assert ended == dict.fromkeys(gpu_run.STEPS, "ok")
    exit_codes = {line["step"]: line["exit_code"] for line in lines if "exit_code" in line}
    optional = {"peers", "load"}  # need packages of their own
    assert {exit_codes[step] for step in exit_codes.keys() - optional} == {0}
    assert {exit_codes[step] for step in optional} <= {0, 1, 2}
    measured = {line["strategy"] for line in lines if "wall_s" in line and "strategy" in line}
    assert {"loop", "vmap", "lowered_vmap"} <= measured
    text = cuda.page(cuda.read(tmp_path))
    assert "| state | ok |" in text
    assert "CUDA graphs require a CUDA device" in text


LINES: list[dict[str, Any]] = [
    {"step": "state", "nvidia_smi": "name\nH100", "versions": {"torch": "2.11.0", "jax": None}},
    {
        **{"step": "strategies", "strategy": "loop", "num_models": 4, "dtype": "bfloat16"},
        **{"wall_s": 8e-3, "event_s": 7e-3, "cold_event_s": 9e-3, "pinned_s": 1e-2},
        **{"reserved_bytes": 2e9, "error": 2e-3, "build_s": 0.5, "notes": []},
    },
    {
        **{"step": "strategies", "strategy": "vmap", "num_models": 4, "dtype": "bfloat16"},
        **{"wall_s": 9e-3, "event_s": 8e-3, "error": 2e-3, "build_s": 0.5, "notes": []},
    },
    {
        **{"step": "strategies", "strategy": "loop", "num_models": 32, "dtype": "bfloat16"},
        **{"wall_s": 64e-3, "error": 2e-3, "build_s": 0.5, "notes": []},
    },
    {
        **{"step": "strategies", "strategy": "vmap", "num_models": 32, "dtype": "bfloat16"},
        **{"wall_s": 10e-3, "error": 2e-3, "build_s": 0.5, "notes": []},
    },
    {"step": "strategies", "status": "out of time", "seconds": 110.0},
]


def test_the_page_has_times_break_even_and_what_did_not_begin() -> None:
    text = cuda.page(LINES)
    assert "H100; torch 2.11.0." in text
    row = "| bfloat16 | 4 | `loop` | 7.000 | 8.000 | 9.000 | 10.000 | 2,000 | 2e-03 | 0.5 |"
    assert row in text
    assert "| bfloat16 | `vmap` | 32 |  |" in text
    assert "| strategies | out of time | 110 s |" in text
    assert "| sweep | not begun |  |" in text


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps(LINES[0])
    (tmp_path / gpu_run.LINES).write_text(f"{whole}\n{whole[:20]}")
    assert cuda.read(tmp_path) == LINES[:1]
