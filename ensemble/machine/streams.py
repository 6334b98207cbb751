"""Make the standard streams writable when a service manager or a shell has closed them. Imports no
torch."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ensemble.errors import InputError, first_line

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDOUT, STDERR = "<stdout>", "<stderr>"  # the names that Python gives them
_DESCRIPTIONS = {STDOUT: "standard output", STDERR: "standard error"}
_LIMITS = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
_NO_THREAD = "can't start new thread"  # the RuntimeError of threading


class _Stream(io.FileIO):
    """A standard stream whose errors have its name as their file name: an OSError without a name
    is not an error of the stream, but of a fork or a pipe."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name = name

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self.name
            raise


def prepare() -> None:
    """Open closed standard streams on /dev/null, escape characters that they cannot encode, and
    name the streams in their errors.

    Otherwise the next file opened would reuse the descriptor of standard output and receive the
    program's output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _named(sys.stdout, STDOUT)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _named(sys.stderr, STDERR)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


def _named(stream: io.TextIOWrapper, name: str) -> io.TextIOWrapper:
    """The stream over a `_Stream`, buffered as before."""
    stream.flush()
    raw = _Stream(stream.fileno(), name)
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextmanager
def flush_on_exit() -> Iterator[None]:
    """Flush standard output at the end of the context.

    Raises:
        InputError: a stream is not writable (disk full, terminal closed), or the system refuses a
            process, a thread or a file.
        BrokenPipeError: the reader has closed the pipe.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        is_blocked = hasattr(error, "characters_written")  # a buffered stream that would block
        if error.filename in _DESCRIPTIONS or is_blocked:
            name = _DESCRIPTIONS.get(error.filename, _DESCRIPTIONS[STDOUT])
            discard(sys.stderr if error.filename == STDERR else sys.stdout)
            raise InputError(f"{name} is not writable: {error.strerror}") from error
        if error.filename is not None:
            raise InputError(f"{os.fsdecode(error.filename)}: {error.strerror}") from error
        if isinstance(error, FileNotFoundError):  # only os.getcwd raises it without a file name
            raise InputError("the working directory no longer exists") from error
        limit = " (a limit of ulimit -a?)" if error.errno in _LIMITS else ""
        raise InputError(f"a system call failed: {error.strerror or error}{limit}") from error
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise InputError(f"{first_line(error)} (a limit of ulimit -a?)") from error


def discard(stream: TextIO | None = None) -> None:
    """Redirect a stream, by default standard output, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def discard_without_terminal() -> None:
    """Redirect standard output and error to /dev/null if their terminal was closed."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
