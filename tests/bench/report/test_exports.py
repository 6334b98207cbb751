"""Result files: each format round-trips, and only our own files are overwritten."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ensemble.bench import result_file
from ensemble.bench.measurement import Measurement
from ensemble.bench.report import exports, pictures
from ensemble.bench.summary import Run
from ensemble.errors import InputError
from ensemble.files import write_atomically
from tests.made import (
    CASE,
    CONFIG,
    ENVIRONMENT,
    LOOP,
    ROW,
    VMAP,
    changed,
    row_of,
)

FAILED = row_of(Measurement(replace(CASE, strategy="openvino"), "failed", 'a "bad", day'))
RUN = Run(ENVIRONMENT, CONFIG.plain(), (ROW, FAILED))


def test_a_result_file_round_trips() -> None:
    assert result_file.from_json(result_file.to_json(RUN)) == RUN
    page = exports.to_markdown(RUN).rpartition(exports.DETAILS)[2].partition("\n```")[0]
    assert result_file.from_json(page) == RUN


def test_the_json_file_follows_its_schema() -> None:
    document = json.loads(result_file.to_json(RUN))
    assert document["schema"] == 3
    assert document["results"][0]["speedup"] == 1.5
    assert document["results"][0]["speedup_interval"] is None
    assert document["environment"]["git_commit"] is None
    assert document["config"]["min_pairs"] == 30
    assert document["config"]["image_size"] == [224]


def test_csv_has_a_line_per_row_and_empty_cells_for_unknown_values() -> None:
    lines = list(csv.DictReader(io.StringIO(exports.to_csv(RUN))))
    row, failed = lines
    assert list(row)[:8] == [*result_file.CASE_FIELDS, "status", "error"]
    assert (row["strategy"], row["speedup"], row["speedup_low"]) == ("vmap", "1.5", "")
    assert (row["processes"], row["pairs"], row["torch"]) == ("1", "3", "2.14.1")
    assert (failed["status"], failed["error"]) == ("failed", 'a "bad", day')
    assert failed["speedup"] == ""
    assert not any("[" in value for value in row.values())  # raw times are in the JSON


def test_a_markdown_report_has_table_answer_machine_and_command() -> None:
    page = exports.to_markdown(RUN)
    assert "too few pairs" in page
    assert "2000.0 (1500.0)" in page
    assert "openvino, 4 models: failed" in page
    assert "threads 2, torch 2.14.1, on 2026-01-01T00:00:00+00:00: `resnet_vmap.py`" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("not json", "expected a JSON file"),
        (result_file.to_json(RUN)[:500], "expected a JSON file, got a truncated"),
        ("[]", "expected a result file of schema 1, 2, 3, got None"),
        ('{"schema": 4}', "expected a result file of schema 1, 2, 3, got 4"),
        ('{"schema": 1}', "expected a result file, got one without 'environment'"),
        (
            json.dumps(
                json.loads(result_file.to_json(RUN))
                | {"results": [{"strategy": "loop", "measurements": []}]}
            ),
            "got one without 'num_models'",
        ),
        (
            json.dumps(json.loads(result_file.to_json(RUN)) | {"results": 5}),
            "expected a result file, got one without",
        ),
        (result_file.to_json(RUN).replace("4.0", '"4"', 1), "expected times in seconds above 0"),
        (result_file.to_json(RUN).replace("4.0", "0.0", 1), "got others in row vmap"),
    ],
)
def test_an_invalid_result_file_is_rejected_with_its_flag_and_path(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        exports.read(str(path), argument="baseline")
    assert str(caught.value).startswith(f"baseline: {path}: ")


def test_a_result_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As an editor on Windows writes it; it stays a file of this program, which it replaces."""
    for form, kind in exports.FORMATS.items():
        path = tmp_path / f"run.{form}"
        path.write_text(kind.write(RUN), encoding="utf-8-sig")
        assert exports.is_own(form, path)
    assert exports.read(str(tmp_path / "run.json"), argument="") == RUN


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="resume: "):
        exports.read(str(path), argument="resume")


def test_a_missing_field_takes_its_default() -> None:
    document = json.loads(result_file.to_json(RUN))
    for row in document["results"]:
        for one in row["measurements"]:
            del one["error_float64"]
    assert result_file.from_json(json.dumps(document)) == RUN


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_default_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "text")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_run_without_rows_can_be_written_in_every_format(tmp_path: Path) -> None:
    paths = {form: str(tmp_path / f"run.{form}") for form in exports.FORMATS}
    exports.save(replace(RUN, results=()), paths)
    assert exports.read(paths["json"], argument="resume").results == ()


def own(tmp_path: Path, form: str, content: str | bytes) -> bool:
    path = tmp_path / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return exports.is_own(form, path)


def test_only_files_of_this_program_are_its_own(tmp_path: Path) -> None:
    run = Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP))
    for form, kind in exports.FORMATS.items():
        assert own(tmp_path, form, kind.write(run))
        assert own(tmp_path, form, "")
    pictures.save(run.results, tmp_path / "p.png", tmp_path / "grid.png")
    pictures.save(run.results, tmp_path / "p.svg", tmp_path / "grid.svg")
    assert exports.is_own("plot", tmp_path / "p.png")
    assert exports.is_own("plot", tmp_path / "p.svg")
    assert not own(tmp_path, "markdown", "# Mine\n```json\n{}\n```\n")
    assert not own(tmp_path, "json", '{"schema": "mine", "environment": 1, "results": 2}')
    assert not own(tmp_path, "json", "[" * 100_000)
    assert not own(tmp_path, "csv", "strategy,num_models,batch_size,image_size,mine\n")
    figure, content = Figure(), io.BytesIO()
    figure.savefig(content, format="png")
    assert not own(tmp_path, "plot", content.getvalue())


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("results", "measurements", [{}]),
        ("results", "num_models", None),
        ("results", "measurements", "abc"),
        ("results", "roofline", [1]),
        ("environment", "argv", None),
        ("environment", "threads", "x" * 5),
        ("environment", "page_fault_s", "abc"),
    ],
)
def test_invalid_values_are_a_one_line_error(
    part: str, field: str, value: object, tmp_path: Path
) -> None:
    document = json.loads(result_file.to_json(Run(ENVIRONMENT, CONFIG.plain(), (LOOP, VMAP))))
    changed_part = document[part][1] if part == "results" else document[part]
    changed_part[field] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"resume: .*: expected a result file") as error:
        exports.read(str(path), argument="resume")
    assert "\n" not in str(error.value)


def test_an_unknown_first_forward_may_be_null(tmp_path: Path) -> None:
    document = json.loads(result_file.to_json(Run(ENVIRONMENT, CONFIG.plain(), (LOOP,))))
    document["environment"]["first_forward_s"] = None
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    assert math.isnan(exports.read(str(path), argument="resume").environment.first_forward_s)


def test_a_symlink_and_the_file_mode_are_preserved(tmp_path: Path) -> None:
    target, link = tmp_path / "run.json", tmp_path / "latest.json"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    write_atomically(tmp_path / ("n" * 250), "a name of almost 255 letters")
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["lates", "nnnnn", "run.j"]


def test_held_memory_is_in_the_files_and_survives_them() -> None:
    row = changed(VMAP, held_bytes=187_000_000, bytes_per_model=46_750_000)
    run = Run(ENVIRONMENT, {}, (row,))
    assert result_file.from_json(result_file.to_json(run)).results == (row,)
    (line,) = csv.DictReader(io.StringIO(exports.to_csv(run)))
    assert (line["held_bytes"], line["bytes_per_model"]) == ("187000000", "46750000")
    content = json.loads(result_file.to_json(run))
    for measurement in content["results"][0]["measurements"]:
        del measurement["held_bytes"], measurement["bytes_per_model"]
    (old,) = result_file.from_json(json.dumps(content)).results
    assert (old.held_bytes, old.bytes_per_model) == (None, None)


def test_figures_of_a_gpu_are_in_the_files_and_survive_them() -> None:
    row = changed(
        VMAP,
        device_times_s=(0.045, 0.047, 0.049),
        reference_device_times_s=(0.09,) * 3,
        with_copies_s=0.0534,
        peak_reserved_bytes=412,
    )
    run = Run(ENVIRONMENT, {}, (row,))
    assert result_file.from_json(result_file.to_json(run)).results == (row,)
    (line,) = csv.DictReader(io.StringIO(exports.to_csv(run)))
    assert (line["device_median_s"], line["with_copies_s"]) == ("0.047", "0.0534")
    assert line["peak_reserved_bytes"] == "412"
    bad = result_file.to_json(run).replace("0.047", "-0.047")
    with pytest.raises(ValueError, match="expected times in seconds above 0"):
        result_file.from_json(bad)
