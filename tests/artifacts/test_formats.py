"""The suffix of a path decides the format, and what may be replaced."""

import os
from pathlib import Path

import pytest

from ensemble.artifacts.formats import Format, check_destination, format_of
from ensemble.errors import InputError


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("winner.pt2", Format.PT2),
        ("a.b/winner.aoti.pt2", Format.AOTI),
        ("winner.onnx", Format.ONNX),
        ("triton_repository", Format.TRITON),
        ("my_repository", Format.TRITON),
        ("models/", Format.TRITON),
        ("models.pt2/", Format.TRITON),
    ],
)
def test_the_suffix_decides_the_format(path: str, expected: Format) -> None:
    assert format_of(path) is expected


@pytest.mark.parametrize(
    "path", ["winner.pt", "winner.pth", "winner", ".pt2", ".onnx", "x.aoti", "."]
)
def test_any_other_name_is_an_error_that_lists_the_four(path: str) -> None:
    with pytest.raises(InputError, match=r"\.pt2 .*\.aoti\.pt2 .*\.onnx.*triton_repository/.*got"):
        format_of(path)


def test_an_earlier_export_is_replaced_and_another_file_only_if_asked(tmp_path: Path) -> None:
    mine, other = tmp_path / "a.pt2", tmp_path / "b.pt2"
    mine.write_bytes(b"PK\x03\x04rest")
    other.write_bytes(b"precious")
    assert check_destination(mine, overwrite=False) is Format.PT2
    with pytest.raises(
        InputError, match=r"expected an earlier file of this kind at .*, got another"
    ):
        check_destination(other, overwrite=False)
    check_destination(other, overwrite=True)
    mine.chmod(0o400)
    with pytest.raises(InputError, match="write-protected"):
        check_destination(mine, overwrite=False)


def test_what_cannot_be_a_file_or_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").mkdir()
    (tmp_path / "triton_repository").write_text("a file")
    os.symlink(tmp_path / "nowhere" / "x.pt2", tmp_path / "link.pt2")
    for path, message in {
        "a.onnx": "expected a file at .*, got a directory",
        "triton_repository": "expected a folder at .*, got a file",
        "missing/x.pt2": "expected a folder at .*missing, got none",
        "link.pt2": "expected a folder at .*nowhere, got none",
        "a" * 300 + ".pt2": "File name too long",
    }.items():
        with pytest.raises(InputError, match=message):
            check_destination(tmp_path / path, overwrite=True)
