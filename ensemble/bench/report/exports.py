"""Result files: JSON, CSV and Markdown, each with everything measured. Imports no torch.

Every format holds raw times, environment, configuration and schema version, so that a picture can
be drawn again, and a figure argued about, from any of them.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ensemble.bench.records import (
    Case,
    Environment,
    Load,
    LoadRun,
    Process,
    Result,
    Run,
)
from ensemble.bench.report.page import page_of
from ensemble.errors import InputError, first_line
from ensemble.files import first_bytes, write_atomically

Record = TypeVar("Record", Case, Environment, Load, LoadRun, Process, Result)

SCHEMA, READ_SCHEMAS = 2, (1, 2)
MARK = "drawn by resnet_vmap.py"  # in the metadata of a picture
DETAILS = "```json\n"  # begins the data in a Markdown file
_HEAD_BYTES = 4096
# Over all processes, for readers.
_OF_PROCESSES = tuple(field.name for field in fields(Process) if field.name != "load")
_OF_LOAD = ("scenario", "held_qps")
# Of the run under load that the row shows, see `Result.load_run`.
_OF_LOAD_RUN = (
    *("p50_s", "p90_s", "p99_s", "requests", "answered", "refused", "failed", "valid"),
    *("why_not", "mean_batch", "wasted_share", "cpu_s_per_request", "overhead_s"),
)
_DERIVED = (
    *("median_s", "iqr_s", "speedup", "speedup_interval", "inconclusive", "roofline_share"),
    *("parallel_efficiency", "communication", "interference", "speedup_over_one_rank"),
)


def to_json(run: Run) -> str:
    """The result file: raw records, with the derived statistics beside them."""
    return json.dumps(_document(run), indent=1) + "\n"


def to_csv(run: Run) -> str:
    """A line a row. A list is a cell of JSON; environment and configuration stand in each line."""
    document = _document(run)
    shared = {"schema": document["schema"]}
    for part in ("environment", "config"):
        shared |= {f"{part}.{name}": value for name, value in document[part].items()}
    rows = [row | shared for row in document["results"]]
    text = io.StringIO()
    names = [*_ROW, *shared]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _to_cell(value) for name, value in row.items()})
    return text.getvalue()


def to_markdown(run: Run) -> str:
    """The table and the verdict for a reader, then the whole document for a program."""
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
            "<details><summary>Everything measured</summary>",
            "",
            f"{DETAILS}{json.dumps(_document(run))}",
            "```",
            "",
            "</details>",
            "",
        ]
    )


def _paragraphs(lines: str) -> str:
    return lines.rstrip("\n").replace("\n", "\n\n")


def from_json(text: str) -> Run:
    """The run of a text of `to_json`; statistics are derived again, not read.

    Raises:
        ValueError: not JSON, another schema, or not a result file.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"expected a whole JSON file, found one that breaks off or is none: {error}"
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema not in READ_SCHEMAS:
        known = " or ".join(map(str, READ_SCHEMAS))
        raise ValueError(f"expected a result file of schema {known}, found {schema}")
    try:
        about = dict(document["environment"])
        if about["first_forward_s"] is None:  # other programs' JSON has null for NaN
            about["first_forward_s"] = math.nan
        environment = _record(Environment, about)
        results = tuple(result_of(row) for row in document["results"])
        run = Run(environment, dict(document["config"]), results)
        for result in results:
            _check_times(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a result file, found one without {error}") from error
    return run


def from_csv(text: str) -> Run:
    """The run of a text of `to_csv`, which holds at least one row."""
    rows = [
        {name: _from_cell(cell) for name, cell in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]
    document = {"schema": rows[0]["schema"], "results": rows}
    for part in ("environment", "config"):
        start = f"{part}."
        document[part] = {
            name.removeprefix(start): value
            for name, value in rows[0].items()
            if name.startswith(start)
        }
    return from_json(json.dumps(document))


def from_markdown(text: str) -> Run:
    """The run of a text of `to_markdown`."""
    return from_json(text.rpartition(DETAILS)[2].partition("\n```")[0])


def read(path: str, *, argument: str) -> Run:
    """The run of a JSON result file.

    Raises:
        InputError: nothing there, or no result file; the message names the argument and the file.
    """
    try:
        first_bytes(path, kind="a result file")
        run = from_json(Path(path).read_text(encoding="utf-8"))
        _check_values(run)
        return run
    except InputError as error:
        raise InputError(str(error), argument=argument) from error
    except UnicodeDecodeError as error:
        message = f"{path}: expected a result file, found one of no text"
        raise InputError(message, argument=argument) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}", argument=argument) from error


def _check_values(run: Run) -> None:
    """Raise ValueError for values that cannot be shown, of a file that was edited."""
    try:
        if not {row.status for row in run.results} <= {"ok", "failed", "unavailable"}:
            raise ValueError("an unknown status")
        page_of(run, columns=True, sentences=True)
        to_json(run)
        " ".join(run.environment.argv)
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"expected a result file, found values that none has ({found})") from error


def read_if(path: str | None, *, argument: str) -> Run | None:
    """`read`, where a file was named."""
    return None if path is None else read(path, argument=argument)


def save(run: Run, paths: Mapping[str, str | None]) -> None:
    """Write the run in each format that `paths`, `{"json": path, ...}`, has a path for."""
    for form, path in paths.items():
        if path is not None:
            write_atomically(Path(path), FORMATS[form](run))


def is_own(form: str, path: Path) -> bool:
    """Is the file at `path` one that this program wrote in that format, or empty? It may be
    replaced: a file of the user's, named by mistake, may not.

    A picture says so among its metadata.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if not head:
            return True
        if form == "plot":
            return MARK.encode() in head
        if form == "csv":
            return head.startswith(",".join(_ROW[:8]).encode())
        text = (head + file.read()).decode(errors="replace")
    if form == "markdown":
        text = text.rpartition(DETAILS)[2].partition("\n```")[0]
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(document, dict)
        and document.get("schema") in READ_SCHEMAS
        and ({"environment", "config", "results"} <= document.keys())
    )


FORMATS = {"json": to_json, "csv": to_csv, "markdown": to_markdown}


def _document(run: Run) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "environment": asdict(run.environment),
        "config": dict(run.config),
        "results": [row_of(result) for result in run.results],
    }


# The keys of a row, in their order.
_ROW = (
    *(field.name for field in fields(Case)),
    *(field.name for field in fields(Result) if field.name != "case"),
    *_OF_PROCESSES,
    *_DERIVED,
    *_OF_LOAD,
    *_OF_LOAD_RUN,
)


def row_of(result: Result) -> dict[str, Any]:
    """A result as one flat row, the statistics over its processes beside them."""
    raw = asdict(result)
    raw |= raw.pop("case")
    raw |= {name: getattr(result.load_run, name, None) for name in _OF_LOAD_RUN}
    return {name: raw[name] if name in raw else getattr(result, name) for name in _ROW}


def result_of(row: Mapping[str, Any]) -> Result:
    """The result of a flat row; one of schema 1 was measured in one process."""
    processes = row.get("processes")
    if processes is None:
        processes = [row] if row["times_s"] or row["build_s"] is not None else []
    values = {
        "case": _record(Case, row),
        "processes": [_process_of(process) for process in processes],
    }
    return _record(Result, {**row, **values})


def _process_of(values: Mapping[str, Any]) -> Process:
    load = values.get("load")
    if load is not None:
        load = _record(Load, {**load, "runs": [_record(LoadRun, run) for run in load["runs"]]})
    return _record(Process, {**values, "load": load})


def _record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A frozen record of plain values; lists become tuples where the field is one."""
    known: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise KeyError(field.name)
        if field.name in values:
            value = values[field.name]
            is_tuple = isinstance(value, list) and str(field.type).startswith("tuple")
            known[field.name] = tuple(value) if is_tuple else value
    return kind(**known)


def _check_times(result: Result) -> None:
    for times in (result.times_s, result.reference_times_s):
        numbers = all(isinstance(time, int | float) for time in times)
        if not numbers or not all(0 < time < math.inf for time in times):
            raise ValueError(
                f"expected times in seconds above 0, found others in the row {result.case.strategy}"
            )


def _to_cell(value: Any) -> str:
    """Text as it is, unless it would be read back as something else: the version "3.11", or bytes
    of a file's name that are no UTF-8."""
    if value is None:
        return ""
    plain_text = isinstance(value, str) and _from_cell(value) == value and _is_utf8(value)
    return value if plain_text else json.dumps(value)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_cell(cell: str) -> Any:
    if cell == "":
        return None
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell
