"""Make the standard streams writable when a service manager or a shell has closed them. Imports no
torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ensemble.errors import InputError


def prepare() -> None:
    """Open closed standard streams on /dev/null, and escape characters that they cannot encode.

    Otherwise the next file opened would reuse the descriptor of standard output and receive the
    program's output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


@contextmanager
def flush_on_exit() -> Iterator[None]:
    """Flush standard output at the end of the context.

    Raises:
        InputError: standard output is not writable: disk full, terminal closed.
        BrokenPipeError: the reader has closed the pipe.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise InputError(f"{os.fsdecode(error.filename)}: {error.strerror}") from error
        if isinstance(error, FileNotFoundError):  # only os.getcwd raises it without a file name
            raise InputError("the working directory no longer exists") from error
        discard()
        raise InputError(f"standard output is not writable: {error.strerror}") from error


def discard() -> None:
    """Redirect standard output to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def discard_without_terminal() -> None:
    """Redirect standard output and error to /dev/null if their terminal was closed."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
