"""Standard streams as service managers, daemons and shells leave them: nothing is lost by them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

import resnet_vmap
from ensemble.bench import result_file
from ensemble.bench.report import exports
from ensemble.bench.summary import Run
from ensemble.errors import InputError
from ensemble.machine import streams
from tests.made import (
    CONFIG,
    ENVIRONMENT,
    LOOP,
    VMAP,
)

PROGRAM = Path(resnet_vmap.__file__)
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    exports.save(Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP)), {"json": str(path)})
    return path


def shown(
    saved: Path, redirect: str, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program shows a saved run, started by a shell with its streams redirected."""
    command = [sys.executable, str(PROGRAM), "--from_json", str(saved), *more]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("closed", list(product((False, True), repeat=3)), ids=str)
def test_files_are_written_whichever_streams_are_closed(
    closed: tuple[bool, ...], saved: Path, tmp_path: Path
) -> None:
    redirect = " ".join(
        text for text, is_closed in zip(CLOSED.values(), closed, strict=True) if is_closed
    )
    table = tmp_path / "run.csv"
    done = shown(saved, redirect, "--export_csv", str(table))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(table.read_text().splitlines()) == 3
    assert ("4 models: vmap is 2.00x faster than the loop" in done.stdout) != closed[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_on_a_full_disk_is_one_line_and_costs_no_file(
    saved: Path, tmp_path: Path
) -> None:
    table = tmp_path / "run.csv"
    done = shown(saved, ">/dev/full", "--export_csv", str(table))
    message = "error: standard output is not writable: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert len(table.read_text().splitlines()) == 3


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{}, C_LOCALE], ids=["as here", "C locale"])
def test_names_that_are_no_utf8_reach_every_file_and_the_table(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Of a model, an image and the files to write: Latin-1 bytes."""
    config = CONFIG.plain() | {"model_path": ["m\udce9.pth"], "image_path": "k\udce9.jpg"}
    environ = replace(ENVIRONMENT, weights="m\udce9.pth", argv=("a", "m\udce9.pth"))
    run = Run(environ, config, (LOOP, VMAP))
    saved = tmp_path / "r\udce9.json"
    exports.save(run, {"json": str(saved)})
    paths = {form: str(tmp_path / f"n\udce9.{form}") for form in (*exports.FORMATS, "png")}
    done = shown(
        saved,
        "",
        *("--export_json", paths["json"], "--export_csv", paths["csv"], "--verbose"),
        *("--export_markdown", paths["markdown"], "--plot", paths["png"], "--baseline", str(saved)),
        **environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 models: vmap is 2.00x faster than the loop" in done.stdout
    assert exports.read(paths["json"], argument="") == run
    assert len(Path(paths["csv"]).read_text("utf-8").splitlines()) == 3
    page = Path(paths["markdown"]).read_text("utf-8")
    assert result_file.is_result_file(page.rpartition(exports.DETAILS)[2].partition("\n```")[0])
    assert Path(paths["png"]).stat().st_size


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(36, "File name too long", "run.json"), r"^run\.json: File name too long$"),
        (
            FileNotFoundError(2, "No such file or directory"),
            "^the working directory no longer exists$",
        ),
    ],
)
def test_an_error_of_another_file_is_not_blamed_on_standard_output(
    error: OSError, message: str
) -> None:
    with pytest.raises(InputError, match=message), streams.flush_on_exit():
        raise error
