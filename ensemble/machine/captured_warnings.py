"""Warnings caught or silenced without leaving filters behind.

`warnings.catch_warnings` puts back the filters of the whole process as it found them: two threads
within it at once leave one's filters for good.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ensemble.machine.per_process import PerProcess

_ONE_AT_A_TIME = PerProcess(threading.RLock)


@contextmanager
def caught(action: Literal["always", "ignore"]) -> Iterator[list[warnings.WarningMessage]]:
    """The warnings within, none of which is printed; one thread at a time."""
    with _ONE_AT_A_TIME(), warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter(action)
        yield messages
