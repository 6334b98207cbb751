"""Standard streams that a service manager, daemon or shell has closed or redirected."""

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
    """Run the program on a saved run, from a shell that redirects its streams."""
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
def test_files_are_written_with_any_standard_streams_closed(
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
def test_a_full_disk_for_stdout_is_a_one_line_error_and_files_are_still_written(
    saved: Path, tmp_path: Path
) -> None:
    table = tmp_path / "run.csv"
    done = shown(saved, ">/dev/full", "--export_csv", str(table))
    message = "error: standard output is not writable: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert len(table.read_text().splitlines()) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", [(), ("-u",)])
@pytest.mark.parametrize(
    ("redirect", "message"),
    [
        (">/dev/full", "standard output is not writable: No space left on device\n"),
        ("2>/dev/full", ""),  # nobody reads it
    ],
)
def test_an_error_of_a_stream_is_attributed_to_it(
    redirect: str, message: str, options: tuple[str, ...]
) -> None:
    program = (
        "import sys\n"
        "from ensemble.errors import InputError\n"
        "from ensemble.machine import streams\n"
        "streams.prepare()\n"
        "try:\n"
        "    with streams.flush_on_exit():\n"
        "        print(99999 * 'long')\n"
        "        print('short', file=sys.stderr)\n"
        "except InputError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, *options, "-c", program],
        cwd=PROGRAM.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, message)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{}, C_LOCALE], ids=["as here", "C locale"])
def test_file_names_that_are_not_utf8_work_in_every_output(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Latin-1 bytes in the names of a model, an image and all output files."""
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
        (  # of a fork
            BlockingIOError(11, "Resource temporarily unavailable"),
            r"^a system call failed: Resource temporarily unavailable \(a limit of ulimit -a\?\)$",
        ),
        (OSError(24, "Too many open files"), "^a system call failed: Too many open files"),
        (OSError(5, "Input/output error"), "^a system call failed: Input/output error$"),
        (RuntimeError("can't start new thread"), "^can't start new thread"),
    ],
)
def test_errors_of_other_files_are_not_attributed_to_standard_output(
    error: Exception, message: str
) -> None:
    with pytest.raises(InputError, match=message), streams.flush_on_exit():
        raise error
