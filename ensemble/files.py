"""Files that the user named: what one to be read can be wrong in, and how one is written whole."""

import os
import tempfile
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
        raise InputError(
            f"{path}: expected {kind}, found an empty file (a download or a copy that failed?)"
        )
    return head


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
