"""Result files: every format gives back the run it came from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ensemble.errors import InputError
from ensemble.files import write_atomically
from ensemble.records import Result, Run
from ensemble.report import exports
from tests.made import CASE, CONFIG, ENVIRONMENT, ROW

FAILED = Result(replace(CASE, strategy="openvino"), status="failed", error='a "bad", day')
RUN = Run(ENVIRONMENT, CONFIG.plain(), (ROW, FAILED))


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (exports.to_json, exports.from_json),
        (exports.to_csv, exports.from_csv),
        (exports.to_markdown, exports.from_markdown),
    ],
)
def test_every_format_gives_back_the_run_it_came_from(
    write: Callable[[Run], str], read: Callable[[str], Run]
) -> None:
    assert read(write(RUN)) == RUN


def test_the_json_file_keeps_to_its_schema() -> None:
    document = json.loads(exports.to_json(RUN))
    assert document["schema"] == 2
    assert document["results"][0]["speedup"] == 1.5
    assert document["results"][0]["speedup_interval"] is None
    assert document["environment"]["git_commit"] is None
    assert document["config"]["min_pairs"] == 20
    assert document["config"]["image_size"] == [224]


def test_a_csv_line_is_a_row_and_an_unknown_value_an_empty_cell() -> None:
    header, row, failed, end = exports.to_csv(RUN).split("\n")
    names = header.split(",")
    assert row.startswith("vmap,4,1,224,float32,shared,ok,,")
    assert failed.startswith('openvino,4,1,224,float32,shared,failed,"a ""bad"", day",[],,,')
    assert end == ""
    assert {"times_s", "environment.torch", "config.seed", "schema"} <= set(names)


def test_a_markdown_page_shows_table_verdict_machine_and_command() -> None:
    page = exports.to_markdown(RUN)
    assert "too few pairs" in page
    assert "2000.0 (1500.0)" in page
    assert "openvino, 4 models: failed" in page
    assert "threads 2, torch 2.14.1, on 2026-01-01T00:00:00+00:00: `resnet_vmap.py`" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ("not json", "expected a whole JSON file"),
        (exports.to_json(RUN)[:500], "expected a whole JSON file, found one that breaks off"),
        ("[]", "expected a result file of schema 1 or 2, found None"),
        ('{"schema": 3}', "expected a result file of schema 1 or 2, found 3"),
        ('{"schema": 1}', "expected a result file, found one without 'environment'"),
        (
            json.dumps(
                json.loads(exports.to_json(RUN))
                | {"results": [{"strategy": "loop", "processes": []}]}
            ),
            "found one without 'num_models'",
        ),
        (
            json.dumps(json.loads(exports.to_json(RUN)) | {"results": 5}),
            "expected a result file, found one without",
        ),
        (exports.to_json(RUN).replace("4.0", '"4"', 1), "expected times in seconds above 0"),
        (exports.to_json(RUN).replace("4.0", "0.0", 1), "found others in the row vmap"),
    ],
)
def test_a_file_that_is_no_result_file_is_refused_with_its_flag_and_name(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        exports.read(str(path), argument="baseline")
    assert str(caught.value).startswith(f"baseline: {path}: ")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="resume: "):
        exports.read(str(path), argument="resume")


def test_a_file_of_an_earlier_version_lacks_only_what_has_a_default() -> None:
    document = json.loads(exports.to_json(RUN))
    for row in document["results"]:
        del row["error_float64"]
    assert exports.from_json(json.dumps(document)) == RUN


def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(
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


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "text")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_run_without_rows_can_be_written_in_every_format(tmp_path: Path) -> None:
    paths = {form: str(tmp_path / f"run.{form}") for form in exports.FORMATS}
    exports.save(replace(RUN, results=()), paths)
    assert exports.read(paths["json"], argument="resume").results == ()
