"""Files: what one to be read can be wrong in, how one is written whole, files without a name."""

import os
import re
import tempfile
from math import inf
from pathlib import Path
from typing import BinaryIO

from ensemble.errors import InputError, first_line

_URL = re.compile(r"(\w{2,}):/+(.+)", re.DOTALL)


def first_bytes(path: str | os.PathLike[str], *, kind: str, count: int = 64) -> bytes:
    """The first `count` bytes of the file at `path`, which should be `kind` ("an image file").

    Raises:
        InputError: nothing there, not a file, empty, or not readable.
    """
    path = Path(path)
    try:
        if not path.exists():
            if url := _URL.match(str(path)):  # a path has lost one of its slashes
                message = f"{url[1]}://{url[2]}: expected the path of {kind}, found a URL"
                raise InputError(f"{message}: download the file first")
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
    """Replace `path` by a file of `content`: at any moment the old or the new is there whole.

    A symbolic link stays, and the file that it points to is replaced; a file keeps its mode.
    """
    # Bytes of a file's name that are no UTF-8 are surrogates in a text: escaped.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".resnet_vmap.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def nameless(size: int = 0, *, free_memory: float = inf) -> BinaryIO:
    """A new file with room for `size` bytes and no name: however a process ends, nothing is left.

    It lies in the temporary folder, or in memory where there is no such folder or no room in it,
    if no more than half of `free_memory` is needed.

    Raises:
        OSError: nor is there room in memory, or the system has no such files.
    """
    try:
        return _reserved(tempfile.TemporaryFile(), size)
    except OSError:
        if size > free_memory / 2 or not hasattr(os, "memfd_create"):
            raise
        return _reserved(os.fdopen(os.memfd_create("resnet_vmap"), "w+b"), size)


def _reserved(file: BinaryIO, size: int) -> BinaryIO:
    """The file, once its disk has promised `size` bytes; it is closed where that fails."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            os.ftruncate(file.fileno(), 0)
    except BaseException:
        file.close()
        raise
    return file


def temporary_folder() -> str:
    """Where temporary files go, in words."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "none can be written to"


def reason(error: BaseException) -> str:
    """Why the system refused: its own words where they are at the root of an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
