"""Result files: JSON, CSV and Markdown, each with everything measured. Imports no torch.

Every format holds raw times, environment, configuration and schema version, so that a picture can
be drawn again, and a figure argued about, from any of them.
"""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ensemble.errors import InputError
from ensemble.files import first_bytes
from ensemble.report import render_table
from ensemble.results import Config, Environment, Result
from ensemble.verdict import render_verdict

SCHEMA = 1
DETAILS = "```json\n"  # begins the data in a Markdown file
_DERIVED = ("median_s", "iqr_s", "speedup", "speedup_interval", "roofline_share")


@dataclass(frozen=True)
class Run:
    """A run as its file holds it. The configuration stays plain: it is shown and compared."""

    environment: Environment
    config: Mapping[str, Any]
    results: tuple[Result, ...]


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
    names = [field.name for field in fields(Result)] + [*_DERIVED, *shared]
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
    return "\n".join(
        [
            "```",
            render_table(run.results).rstrip("\n"),
            "```",
            "",
            render_verdict(run.results, environment).rstrip("\n").replace("\n", "\n\n"),
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


def from_json(text: str) -> Run:
    """The run of a text of `to_json`; statistics are derived again, not read.

    Raises:
        ValueError: not JSON, another schema, or not a result file.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected a whole JSON file, found one that breaks off or is none: {error}"
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"expected a result file of schema {SCHEMA}, found {schema}")
    try:
        environment = _record(Environment, document["environment"])
        results = tuple(_record(Result, row) for row in document["results"])
        run = Run(environment, dict(document["config"]), results)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a result file, found one without {error}") from error
    for row in results:
        _check_times(row)
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


def read(path: str, *, flag: str) -> Run:
    """The run of a JSON result file.

    Raises:
        InputError: nothing there, or no result file; the message names the flag and the file.
    """
    try:
        first_bytes(path, kind="a result file")
        return from_json(Path(path).read_text())
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{flag}: {path}: expected a result file, found one of no text") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {path}: {error}") from error


def save(run: Run, paths: Mapping[str, str | None]) -> None:
    """Write the run in each format that `paths`, `{"json": path, ...}`, has a path for."""
    for form, path in paths.items():
        if path is not None:
            write_atomically(Path(path), FORMATS[form](run))


FORMATS = {"json": to_json, "csv": to_csv, "markdown": to_markdown}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by a file of `content`: at any moment the old or the new is there whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def plain(config: Config) -> dict[str, Any]:
    """A configuration as a file has it: tuples are lists there."""
    return json.loads(json.dumps(asdict(config)))


def _document(run: Run) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "environment": asdict(run.environment),
        "config": dict(run.config),
        "results": [
            asdict(result) | {name: getattr(result, name) for name in _DERIVED}
            for result in run.results
        ],
    }


def _record(kind: type, values: Mapping[str, Any]) -> Any:
    """A frozen record of plain values; lists become tuples where the field is one."""
    known = {}
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise KeyError(field.name)
        if field.name in values:
            value = values[field.name]
            is_tuple = isinstance(value, list) and str(field.type).startswith("tuple")
            known[field.name] = tuple(value) if is_tuple else value
    return kind(**known)


def _check_times(row: Result) -> None:
    for times in (row.times_s, row.reference_times_s):
        numbers = isinstance(times, tuple) and all(isinstance(own, int | float) for own in times)
        if not numbers or not all(0 < own < math.inf for own in times):
            raise ValueError(
                f"expected times in seconds above 0, found others in the row {row.strategy}"
            )


def _to_cell(value: Any) -> str:
    """Text as it is, unless it would be read back as something else (the version "3.11")."""
    if value is None:
        return ""
    plain_text = isinstance(value, str) and _from_cell(value) == value
    return value if plain_text else json.dumps(value)


def _from_cell(cell: str) -> Any:
    if cell == "":
        return None
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
