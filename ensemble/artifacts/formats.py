"""Path -> format of an exported file, and whether it may be written there. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path

from ensemble.errors import InputError
from ensemble.files import check_writable, is_write_protected

REPOSITORY = "triton_repository"
EXPECTED = (
    f"a name that ends in .pt2 (torch.export), .aoti.pt2 (AOTInductor) or .onnx, or a folder"
    f" {REPOSITORY}/ (Triton Inference Server)"
)


class Format(Enum):
    """What is written; the value is the suffix of its path."""

    PT2 = ".pt2"
    AOTI = ".aoti.pt2"
    ONNX = ".onnx"
    TRITON = "/"

    @property
    def strategy(self) -> str:
        """The strategy that runs such a file; Triton's ONNX back end runs an ONNX graph."""
        return _STRATEGIES[self]


_STRATEGIES = {
    Format.PT2: "exported_pt2",
    Format.AOTI: "exported_aoti",
    Format.ONNX: "exported_onnx",
    Format.TRITON: "exported_onnx",
}
# First bytes: a ZIP archive; the field `ir_version`, which ONNX graphs begin with.
SAVED_MAGIC = b"ENSEMBLE"
_MAGIC = {Format.PT2: b"PK\x03\x04", Format.AOTI: b"PK\x03\x04", Format.ONNX: b"\x08"}


def format_of(path: str | os.PathLike[str], *, argument: str = "path") -> Format:
    """The format that a path asks for by its suffix; a folder is a Triton model repository if its
    name is, or ends in, `_repository`, or the path ends in a slash.

    Raises:
        InputError: none of the four.
    """
    text = os.fspath(path)
    if text.endswith(("/", os.sep)) or Path(text).name.endswith("_repository"):
        return Format.TRITON
    for form in (Format.AOTI, Format.PT2, Format.ONNX):  # the longer suffix first
        if Path(text).name.endswith(form.value) and Path(text).name != form.value:
            return form
    raise InputError(f"expected {EXPECTED}, got {text}", argument=argument)


def check_destination(
    path: str | os.PathLike[str], *, overwrite: bool, argument: str = "path"
) -> Format:
    """Check that a file or folder can be written at `path`; returns its format.

    overwrite: also replace a file that is no earlier export, or is write-protected.

    Raises:
        InputError: an unknown format, no such folder, no permission, or another file is there.
    """
    form, place = format_of(path, argument=argument), Path(os.path.realpath(path))
    _check(partial(_problem, form), path, overwrite=overwrite, argument=argument)
    if place.is_dir():
        check_writable(place, argument=argument)
    return form


def check_saved_destination(
    path: str | os.PathLike[str], *, overwrite: bool, argument: str = "path"
) -> None:
    """Check that `ensemble.save` can write a file at `path`; see `check_destination`."""
    if os.fspath(path).endswith(("/", os.sep)):
        raise InputError(f"expected the path of a file, got {path}", argument=argument)
    _check(partial(_problem_of_file, SAVED_MAGIC), path, overwrite=overwrite, argument=argument)


def _check(
    problem_of: Callable[..., str],
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    argument: str,
) -> None:
    """Raise InputError unless a path may be written to, by `(place, overwrite)` -> the problem."""
    place = Path(os.path.realpath(path))
    try:
        problem = problem_of(place, overwrite=overwrite)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", argument=argument) from error
    if problem:
        raise InputError(problem, argument=argument)
    check_writable(place.parent, argument=argument)


def _problem(form: Format, place: Path, *, overwrite: bool) -> str:
    if form is not Format.TRITON:
        return _problem_of_file(_MAGIC[form], place, overwrite=overwrite)
    if not place.parent.is_dir():
        return f"expected a folder at {place.parent}, got none"
    if not place.exists() or place.is_dir():
        return ""
    return f"expected a folder at {place}, got a file"


def _problem_of_file(magic: bytes, place: Path, *, overwrite: bool) -> str:
    if not place.parent.is_dir():
        return f"expected a folder at {place.parent}, got none"
    if not place.exists():
        return ""
    if not place.is_file():
        return f"expected a file at {place}, got a directory or a device"
    if overwrite:
        return ""
    if is_write_protected(place):
        return f"expected a writable file at {place}, got a write-protected one"
    with place.open("rb") as file:
        is_earlier = file.read(len(magic)) == magic
    return "" if is_earlier else f"expected an earlier file of this kind at {place}, got another"
