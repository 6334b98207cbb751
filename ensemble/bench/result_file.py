"""Result files in JSON: measurements as raw values, with their statistics. Imports no torch.

Statistics are derived again when a file is read, so that a picture can be drawn again, and a figure
argued about.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ensemble.bench.case import Case
from ensemble.bench.environment import Environment
from ensemble.bench.load.record import LoadRun, LoadTest, RateEstimate
from ensemble.bench.measurement import (
    FAILED,
    OK,
    UNAVAILABLE,
    Measurement,
    Note,
    RankTimes,
    Roofline,
)
from ensemble.bench.summary import Run, Summary
from ensemble.errors import InputError
from ensemble.files import first_bytes
from ensemble.machine.gpu_state import GpuProcess, GpuState

Record = TypeVar(
    "Record",
    Case,
    Environment,
    GpuState,
    LoadRun,
    LoadTest,
    Measurement,
    RankTimes,
    Roofline,
    RateEstimate,
)

SCHEMA, READ_SCHEMAS = 3, (1, 2, 3)
CASE_FIELDS = tuple(field.name for field in fields(Case))
# Statistics of a row, in their order; those of a load test are of the run that the table shows.
STATISTICS = (
    *("median_s", "iqr_s", "reference_median_s", "speedup", "speedup_interval", "inconclusive"),
    *("device_median_s", "with_copies_s", "build_s", "first_call_s", "tune_s"),
    *("peak_memory_bytes", "peak_reserved_bytes", "held_bytes", "bytes_per_model"),
    "page_faults_per_call",
    *("max_rel_error", "error_float64", "top1_agreement", "others_cpu_share", "roofline_share"),
)
OF_RANKS = (*("parallel_efficiency", "communication", "interference", "speedup_over_one_rank"),)
OF_LOAD_RUN = (
    *("p50_s", "p90_s", "p99_s", "requests", "answered", "refused", "failed", "valid"),
    *("why_not", "mean_batch", "wasted_share", "cpu_s_per_request", "overhead_s"),
)


def to_json(run: Run) -> str:
    """The text of a result file."""
    return json.dumps(document(run), indent=1) + "\n"


def document(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    return {
        "schema": SCHEMA,
        "environment": asdict(run.environment),
        "config": dict(run.config),
        "results": [
            {
                **plain_summary(row),
                "top1": row.top1,
                "roofline": row.roofline and asdict(row.roofline),
                "measurements": [plain_measurement(one) for one in row.measurements],
            }
            for row in run.results
        ],
    }


def plain_summary(row: Summary) -> dict[str, Any]:
    """A row without its raw values: the case, its status, and its statistics."""
    load_test, ranks = row.load, row.ranks
    shown = load_test.reported_run if load_test else None
    return {
        **asdict(row.case),
        "status": row.status,
        "error": row.error,
        "picked": row.picked,
        "notes": list(row.notes),
        "processes": len(row.processes),
        "pairs": len(row.ratios),
        **{name: getattr(row, name) for name in STATISTICS},
        **{name: getattr(ranks, name, None) for name in OF_RANKS},
        "scenario": load_test.scenario if load_test else None,
        "held_qps": load_test.sustained_qps if load_test else None,
        **{name: getattr(shown, name, None) for name in OF_LOAD_RUN},
    }


def plain_measurement(one: Measurement) -> dict[str, Any]:
    """A measurement as plain values."""
    return asdict(one)


def from_json(text: str) -> Run:
    """The run of a text of `to_json`, or of an earlier schema.

    Raises:
        ValueError: not JSON, another schema, or not a result file.
    """
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON file, got a truncated or different one: {error}"
        ) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in READ_SCHEMAS:
        known = ", ".join(map(str, READ_SCHEMAS))
        raise ValueError(f"expected a result file of schema {known}, got {schema}")
    try:
        environment = environment_of(content["environment"])
        read_row = _summary_of if schema == SCHEMA else _summary_before_schema_3
        results = tuple(map(read_row, content["results"]))
        run = Run(environment, dict(content["config"]), results)
        for result in results:
            _check_times(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a result file, got one without {error}") from error
    return run


def read(path: str, *, argument: str) -> Run:
    """The run of a JSON result file.

    Raises:
        InputError: nothing there, or no result file; the message names the argument and the file.
    """
    try:
        first_bytes(path, kind="a result file")
        run = from_json(Path(path).read_text(encoding="utf-8-sig"))
        if not {row.status for row in run.results} <= {OK, FAILED, UNAVAILABLE}:
            raise ValueError("expected a result file, got one with an unknown status")
        return run
    except InputError as error:
        raise InputError(str(error), argument=argument) from error
    except UnicodeDecodeError as error:
        message = f"{path}: expected a result file, got a binary file"
        raise InputError(message, argument=argument) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}", argument=argument) from error


def is_result_file(text: str) -> bool:
    """Does a text look like one of `to_json`, of any schema?"""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and content.get("schema") in READ_SCHEMAS
        and {"environment", "config", "results"} <= content.keys()
    )


def environment_of(values: Mapping[str, Any]) -> Environment:
    """The environment of its plain values."""
    about = {**values, "gpu": _gpu_of(values.get("gpu"))}
    if about["first_forward_s"] is None:  # other programs write null for NaN
        about["first_forward_s"] = math.nan
    return _record(Environment, about)


def measurement_of(values: Mapping[str, Any]) -> Measurement:
    """The measurement of its plain values."""
    load_test, ranks = values.get("load"), values.get("ranks")
    return _record(
        Measurement,
        {
            **values,
            "case": _record(Case, values["case"]),
            "notes": [Note(**note) for note in values.get("notes", [])],
            "load": _load_test_of(load_test) if load_test else None,
            "ranks": _record(RankTimes, ranks) if ranks else None,
            "gpu": _gpu_of(values.get("gpu")),
        },
    )


def _gpu_of(values: Mapping[str, Any] | None) -> GpuState | None:
    if values is None:
        return None
    others = values.get("other_processes")
    processes = None if others is None else tuple(GpuProcess(**one) for one in others)
    return _record(GpuState, {**values, "other_processes": processes})


def _summary_of(row: Mapping[str, Any]) -> Summary:
    roofline = row.get("roofline")
    return Summary(
        _record(Case, row),
        tuple(map(measurement_of, row["measurements"])),
        _record(Roofline, roofline) if roofline else None,
    )


def _summary_before_schema_3(row: Mapping[str, Any]) -> Summary:
    """A flat row with `processes`; one of schema 1 was measured in one process, its own fields.

    What such a row has once for all processes becomes that of the first measurement.
    """
    case = _record(Case, row)
    processes = row.get("processes")
    if processes is None:
        processes = [row] if row["times_s"] or row["build_s"] is not None else []
    shared = {
        **{name: row.get(name) for name in ("status", "error", "picked", "top1", "top1_agreement")},
        **{name: row.get(name) for name in ("max_rel_error", "error_float64")},
        "notes": tuple(map(Note, row["notes"])),
    }
    measurements: list[Measurement] = []
    for values in processes or [{"times_s": [], "reference_times_s": []}]:
        ranks = {field.name: tuple(values.get(field.name, ())) for field in fields(RankTimes)}
        load_test = values.get("load")
        measurements.append(
            _record(
                Measurement,
                {
                    **{name: values[name] for name in _OF_PROCESS if name in values},
                    **({} if measurements else shared),
                    "case": case,
                    "load": _load_test_of(load_test) if load_test else None,
                    "ranks": RankTimes(**ranks) if any(ranks.values()) else None,
                },
            )
        )
    least_s, bound = row.get("least_s"), row.get("bound")
    return Summary(case, tuple(measurements), Roofline(least_s, bound) if least_s else None)


_OF_PROCESS = (
    *("times_s", "reference_times_s", "build_s", "first_call_s", "peak_memory_bytes", "tune_s"),
    *("page_faults_per_call", "reference_page_faults_per_call", "others_cpu_share"),
)


def _load_test_of(values: Mapping[str, Any]) -> LoadTest:
    estimate = values.get("estimate")
    return _record(
        LoadTest,
        {
            **values,
            "runs": [_record(LoadRun, run) for run in values["runs"]],
            "estimate": _record(RateEstimate, estimate) if estimate else None,
        },
    )


def _record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A frozen record of plain values; lists become tuples where the field is one."""
    if not isinstance(values, Mapping):
        raise TypeError(f"values of {kind.__name__}")
    known: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise KeyError(field.name)
        if field.name in values:
            value = values[field.name]
            is_tuple = isinstance(value, list) and str(field.type).find("tuple[") >= 0
            known[field.name] = tuple(value) if is_tuple else value
    return kind(**known)


def _check_times(result: Summary) -> None:
    alone = [time for one in result.measurements for time in one.reference_alone_times_s]
    on_device = [
        time
        for one in result.measurements
        for time in (*one.device_times_s, *one.reference_device_times_s)
    ]
    for times in (result.times_s, result.reference_times_s, alone, on_device):
        numbers = all(isinstance(time, int | float) for time in times)
        if not numbers or not all(0 < time < math.inf for time in times):
            raise ValueError(
                f"expected times in seconds above 0, got others in row {result.case.strategy}"
            )
