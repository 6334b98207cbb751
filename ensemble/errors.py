"""The exception that means "the user's input is wrong", and the one for "not on this machine"."""


class InputError(ValueError):
    """Bad input. The message names the file or the flag, what was expected and what was found."""


class UnavailableError(RuntimeError):
    """A strategy cannot run here: the wrong device, or a package that is not installed."""
