"""Write results: JSON with raw values, a CSV summary, a Markdown report. Imports no torch."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.bench import result_file
from ensemble.bench.report.page import page_of
from ensemble.bench.summary import Run
from ensemble.errors import InputError, first_line
from ensemble.files import write_atomically

MARK = "drawn by resnet_vmap.py"  # in the metadata of a picture
DETAILS = "```json\n"  # begins the data in a Markdown file
_HEAD_BYTES = 4096
# The first columns of a CSV file, of every version: they identify one of this program.
_FIRST_COLUMNS = (*result_file.CASE_FIELDS, "status", "error")


def to_csv(run: Run) -> str:
    """A summary, one line per row, with the machine and the version of torch."""
    about = run.environment
    shared = {
        **{"device_name": about.device_name or about.device, "threads": about.threads},
        **{"torch": about.torch, "date": about.date, "git_commit": about.git_commit},
    }
    rows = [_flat(result_file.plain_summary(row)) | shared for row in run.results]
    text = io.StringIO()
    names = [*rows[0]] if rows else [*_FIRST_COLUMNS]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A flat row: the interval in two columns, the notes in one."""
    interval = row.pop("speedup_interval") or (None, None)
    row["notes"] = "; ".join(row["notes"])
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat[name] = _printable(value) if isinstance(value, str) else value
        if name == "speedup":
            flat |= {"speedup_low": interval[0], "speedup_high": interval[1]}
    return flat


def _printable(text: str) -> str:
    """The text with surrogates of undecodable file names escaped."""
    return text.encode(errors="backslashreplace").decode()


def to_markdown(run: Run) -> str:
    """The table and the verdict for a reader, then the whole result file for a program."""
    environment = run.environment
    where = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("device", environment.device_name or environment.device),
            ("threads", environment.threads),
            ("torch", environment.torch),
            ("commit", environment.git_commit),
            ("on", environment.date),
        )
        if value is not None
    )
    command = " ".join(environment.argv)
    page = page_of(run, columns=True, sentences=False)
    return "\n".join(
        [
            _paragraphs(page.answer),
            "",
            "```",
            (page.table + page.notes).rstrip("\n"),
            "```",
            "",
            _paragraphs(page.remarks),
            "",
            f"{where}: `{command}`",
            "",
            "<details><summary>All results</summary>",
            "",
            f"{DETAILS}{json.dumps(result_file.document(run))}",
            "```",
            "",
            "</details>",
            "",
        ]
    )


def _paragraphs(lines: str) -> str:
    return lines.rstrip("\n").replace("\n", "\n\n")


def read(path: str, *, argument: str) -> Run:
    """The run of a JSON result file, checked to be printable.

    Raises:
        InputError: no file, or no result file; the message names the argument and the file.
    """
    run = result_file.read(path, argument=argument)
    try:
        page_of(run, columns=True, sentences=True)
        result_file.to_json(run)
        " ".join(run.environment.argv)
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        message = f"{path}: expected a result file, got invalid values ({found})"
        raise InputError(message, argument=argument) from error
    return run


def read_if(path: str | None, *, argument: str) -> Run | None:
    """`read`, or None without a path."""
    return None if path is None else read(path, argument=argument)


def save(run: Run, paths: Mapping[str, str | None]) -> None:
    """Write the run in each format of `paths`, `{"json": path, ...}`, with a path."""
    for form, path in paths.items():
        if path is not None:
            write_atomically(Path(path), FORMATS[form].write(run))


def is_own(form: str, path: Path) -> bool:
    """Did this program write the file at `path`, in this format, or is it empty?

    Only such a file may be replaced. Pictures carry a mark in their metadata.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8)  # an editor may add one
        if not head:
            return True
        if form == "plot":
            return MARK.encode() in head
        text = (head + file.read()).decode(errors="replace")
    return FORMATS[form].is_own(text)


def _is_csv(text: str) -> bool:
    return text.startswith(",".join(_FIRST_COLUMNS))


def _is_markdown(text: str) -> bool:
    return result_file.is_result_file(text.rpartition(DETAILS)[2].partition("\n```")[0])


@dataclass(frozen=True)
class Format:
    """How a run is written, and whether a text was written so by some version of this program."""

    write: Callable[[Run], str]
    is_own: Callable[[str], bool]


FORMATS = {
    "json": Format(result_file.to_json, result_file.is_result_file),
    "csv": Format(to_csv, _is_csv),
    "markdown": Format(to_markdown, _is_markdown),
}
