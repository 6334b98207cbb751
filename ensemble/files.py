"""File access: validated reads, atomic writes, anonymous temporary files."""

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import BinaryIO

from ensemble.errors import InputError, first_line

_URL = re.compile(r"(\w{2,}):/+(.+)", re.DOTALL)


def first_bytes(path: str | os.PathLike[str], *, kind: str, count: int = 64) -> bytes:
    """The first `count` bytes of the file at `path`; `kind` ("an image file") is for messages.

    Raises:
        InputError: it does not exist, is not a regular file, is empty, or is not readable.
    """
    path = Path(path)
    try:
        if not path.exists():
            if url := _URL.match(str(path)):  # Path collapses the double slash
                message = f"{url[1]}://{url[2]}: expected the path of {kind}, got a URL"
                raise InputError(f"{message}; download the file first")
            raise InputError(f"{path}: expected {kind}, but no such file exists")
        if not path.is_file():
            raise InputError(f"{path}: expected {kind}, got a directory or a device")
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:  # missing permission, file name too long, I/O error
        reason = error.strerror or error
        raise InputError(f"{path}: expected {kind}, but it cannot be read: {reason}") from error
    if not head:
        raise InputError(f"{path}: expected {kind}, got an empty file (failed download or copy?)")
    return head


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` with `content` by renaming a temporary file: readers see the old file or the
    new one, never a partial one.

    Symbolic links are followed, and the file mode is preserved.
    """
    # File names that are not UTF-8 decode to surrogates, which cannot be encoded: escape them.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path` at the end of the context; see `write_atomically`."""
    path = Path(os.path.realpath(path))
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".resnet_vmap.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(folder: Path, *, argument: str) -> None:
    """Raise InputError, which names the argument, unless files can be created in the folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"expected to write in {folder}: {reason}", argument=argument) from error


def is_write_protected(path: str | os.PathLike[str]) -> bool:
    """Whether a file's owner has cleared its write permission, or this process has none: renaming
    another file over it would need neither, and root passes every check of permissions."""
    return not os.stat(path).st_mode & stat.S_IWUSR or not os.access(path, os.W_OK)


def anonymous_file(size: int = 0, *, free_memory: float = inf) -> BinaryIO:
    """An unlinked file with `size` bytes reserved; the kernel frees it when the process exits.

    It is created in the temporary directory. If that is missing or full, it is a memfd instead,
    provided that `size` is at most half of `free_memory` (bytes).

    Raises:
        OSError: memory does not suffice either, or the platform has no memfd.
    """
    try:
        return _reserved(tempfile.TemporaryFile(), size)
    except OSError:
        if size > free_memory / 2 or not hasattr(os, "memfd_create"):
            raise
        return _reserved(os.fdopen(os.memfd_create("resnet_vmap"), "w+b"), size)


def _reserved(file: BinaryIO, size: int) -> BinaryIO:
    """Reserve `size` bytes of disk space for `file`; close it if that fails."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            os.ftruncate(file.fileno(), 0)
    except BaseException:
        file.close()
        raise
    return file


def temporary_directory() -> str:
    """The temporary directory, for messages."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "none is writable"


def reason(error: BaseException) -> str:
    """The `strerror` of the OSError that caused `error`, else the first line of its message."""
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
