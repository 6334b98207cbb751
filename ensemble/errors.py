"""What goes wrong outside of this program: the user's input, this machine, another rank."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class InputError(ValueError):
    """Bad input: what was expected, and what was found.

    `argument` names what the caller passed; the command line turns it into the flag of that name.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(f"{argument}: {message}" if argument else message)
        self.message, self.argument = message, argument


class UnavailableError(RuntimeError):
    """A strategy cannot run here: the wrong device, or a package that is not installed."""


class RankError(BaseException):
    """Another rank of the run has ended, or says nothing: no step can be taken together any more.

    Like KeyboardInterrupt it ends the run: no `except Exception`, which makes a failure of a row or
    of a figure out of what it meets, may take it.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end: the scheduler's SIGTERM, or SIGHUP of its terminal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """That of a shell for a process that the signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


@contextmanager
def import_errors() -> Iterator[None]:
    """Imports of installed packages: what keeps one from being imported is an InputError.

    Raises:
        InputError: a package is not installed, or its libraries cannot be loaded into memory.
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
    """The first line of what an error says, without colours; its type's name where it is empty."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
