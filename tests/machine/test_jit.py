"""Whether numba can compile here, and what the strategies do where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_vmap

ROOT = Path(resnet_vmap.__file__).parent


def output_of(program: str, **environment: str) -> str:
    """What a program prints in a separate process: numba reads its variables once."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BUILD = """\
import torch
from ensemble.bench.build import build
from ensemble.bench.stages import reported_compilation
from ensemble.errors import UnavailableError
from ensemble.machine.dtypes import FLOAT32
from tests.tiny import tiny_models
for name in ("lowered_vmap", "best"):
    try:
        with reported_compilation(name, print):
            built = build(name, tiny_models(2), torch.randn(1, 3, 8, 8), FLOAT32)
    except UnavailableError as error:
        print(name, error)
    else:
        print(name, "lowered_vmap" in str(built.notes[0].details), built.choice.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("NUMBA_DISABLE_JIT", "1", "NUMBA_DISABLE_JIT=1 disables numba"),
        (
            "NUMBA_NUM_THREADS",
            "0",
            "numba cannot be imported with NUMBA_NUM_THREADS=0: Number of threads specified must",
        ),
    ],
)
def test_a_variable_that_disables_numba_is_named_and_best_takes_another_strategy(
    variable: str, value: str, reason: str
) -> None:
    lowered, best = output_of(BUILD, **{variable: value}).splitlines()
    assert lowered.startswith(f"lowered_vmap the kernels are compiled by numba, but {reason}")
    name, was_tried, choice = best.split()
    assert (name, was_tried) == ("best", "True")
    assert choice != "lowered_vmap"


def test_numba_that_can_compile_is_usable() -> None:
    program = "from ensemble.machine import jit; print(jit.is_usable(), [jit.why_not()])"
    assert output_of(program) == "True ['']"


def test_numba_that_is_not_installed_is_not_usable_and_has_no_reason() -> None:
    program = (
        "import importlib.util as util; util.find_spec = lambda name: None\n"
        "from ensemble.machine import jit; print(jit.is_usable(), [jit.why_not()])"
    )
    assert output_of(program) == "False ['']"
