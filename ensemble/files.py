"""The first look at a file that the user named: what every kind of file can be wrong in."""

import os
from pathlib import Path

from ensemble.errors import InputError


def first_bytes(path: str | os.PathLike[str], *, kind: str, count: int = 64) -> bytes:
    """The first `count` bytes of the file at `path`, which should be `kind` ("an image file").

    Raises:
        InputError: nothing there, not a file, empty, or not readable.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path}: expected {kind}, found nothing there")
        if not path.is_file():
            raise InputError(f"{path}: expected {kind}, found a directory or a device")
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:  # no permission, a name that is too long, a failing disk
        reason = error.strerror or error
        raise InputError(
            f"{path}: expected {kind}, found one that cannot be read: {reason}"
        ) from error
    if not head:
        raise InputError(f"{path}: expected {kind}, found an empty file")
    return head
