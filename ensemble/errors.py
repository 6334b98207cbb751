"""Errors caused from outside this program: by the user's input, this machine, or another rank."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class InputError(ValueError):
    """Invalid input. The message has the form "expected ..., got ...".

    `argument` names the offending argument; the command line prints it as the flag of that name.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(f"{argument}: {message}" if argument else message)
        self.message, self.argument = message, argument


class UnavailableError(RuntimeError):
    """A strategy cannot run here: wrong device, missing package, or unsupported model."""


class RankError(BaseException):
    """Another rank of the run has exited or stopped responding; collectives would hang.

    Derives from BaseException, like KeyboardInterrupt, so that no `except Exception` that records
    the failure of one measurement swallows it.
    """


class Stopped(KeyboardInterrupt):
    """A termination signal arrived: SIGTERM from a scheduler, or SIGHUP from a closed terminal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a shell for a process killed by it: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that `error` is, or that was raised before it on the same way out.

    Foreign code may replace it: torch's zip writer, which is closed while it propagates, raises a
    RuntimeError.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause


def chained(error: BaseException) -> Iterator[BaseException]:
    """The error, then its causes and the errors during whose handling it was raised; each once.

    As a traceback shows them: `raise ... from None` hides the context.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        context = None if one.__suppress_context__ else one.__context__
        waiting += [behind for behind in (one.__cause__, context) if behind is not None]


def drop_frames(error: BaseException) -> None:
    """Remove the tracebacks of an error and of those behind it: their frames hold tensors."""
    for one in list(chained(error)):
        one.__traceback__ = None


@contextmanager
def import_errors_as_input_errors() -> Iterator[None]:
    """Convert failing imports of installed packages to InputError.

    Raises:
        InputError: a package is not installed, or its shared libraries cannot be loaded.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "ensemble":
            raise
        message = f"the package {error.name} is not installed: pip install -r requirements.txt"
        raise InputError(message) from error
    except (ImportError, OSError, MemoryError) as error:
        message = f"an installed package cannot be imported: {first_line(error)}"
        raise InputError(message) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message without ANSI colors; its type name if that is empty."""
    lines = _ANSI_COLOR.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
