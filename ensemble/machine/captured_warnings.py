"""Capture or silence warnings, safely across threads.

`warnings.catch_warnings` saves and restores the filters of the whole process: if two threads are
inside it at once, the filters of one of them stay in place.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ensemble.machine.per_process import PerProcess

_LOCK = PerProcess(threading.RLock)


@contextmanager
def capture(action: Literal["always", "ignore"]) -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings within instead of printing them; one thread at a time."""
    with _LOCK(), warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter(action)
        yield messages
