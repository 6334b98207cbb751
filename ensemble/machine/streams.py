"""Standard streams that can be written to, whatever a service manager or a shell has made of them.
Imports no torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ensemble.errors import InputError


def prepare() -> None:
    """Open what is closed, to nowhere, and print letters that a stream's encoding lacks as others.

    A closed descriptor is taken at once, or the next file that is opened would have the number of
    standard output, and get what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number: this one
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


@contextmanager
def written() -> Iterator[None]:
    """What is printed within has reached standard output at the end.

    Raises:
        InputError: it cannot be written to: a full disk, a terminal that is gone.
        BrokenPipeError: who reads it has read enough.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise InputError(f"{os.fsdecode(error.filename)}: {error.strerror}") from error
        if isinstance(error, FileNotFoundError):  # os.getcwd: of nothing else on the way
            raise InputError("the working folder is gone") from error
        discard()
        raise InputError(f"standard output cannot be written: {error.strerror}") from error


def discard() -> None:
    """From here on what is printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_terminal() -> None:
    """Print nowhere where the terminal is gone."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
