"""Whether numba can compile kernels here: environment variables may disable it."""

import os
from functools import cache
from importlib.util import find_spec

from ensemble.errors import first_line


def is_usable() -> bool:
    """Whether numba is installed and can compile."""
    return find_spec("numba") is not None and not why_not()


@cache
def why_not() -> str:
    """Why numba cannot compile although it is installed; empty if it can, or is not installed."""
    if find_spec("numba") is None:
        return ""
    try:
        from numba.core import config
    except ImportError:  # of llvmlite, say: as if it were not installed
        return ""
    except Exception as error:  # numba validates its variables when it is imported
        return f"numba cannot be imported with {_variables()}: {first_line(error)}"
    disabled = config.DISABLE_JIT  # type: ignore[attr-defined]
    return f"{_variables('NUMBA_DISABLE_JIT')} disables numba" if disabled else ""


def require() -> None:
    """Raise ImportError if numba is installed but cannot compile: as if it were not installed."""
    if reason := why_not():
        raise ImportError(reason)


def _variables(start: str = "NUMBA_") -> str:
    """The environment variables of numba."""
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(start)]
    return ", ".join(sorted(found)) or f"{start} set"
