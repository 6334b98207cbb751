"""The exception that means "the user's input is wrong", and the one for "not on this machine"."""


class InputError(ValueError):
    """Bad input: what was expected, and what was found.

    `argument` names what the caller passed; the command line turns it into the flag of that name.
    """

    def __init__(self, message: str, *, argument: str | None = None) -> None:
        super().__init__(f"{argument}: {message}" if argument else message)
        self.message, self.argument = message, argument


class UnavailableError(RuntimeError):
    """A strategy cannot run here: the wrong device, or a package that is not installed."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its type's name where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
