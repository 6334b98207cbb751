"""SIGTERM and SIGHUP end the program as Ctrl-C does: what is finished is kept. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ensemble.errors import Stopped
from ensemble.machine import streams

# Of a scheduler or `docker stop`, and of a terminal that was closed. Windows has no SIGHUP.
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
STOPPING = ("SIGTERM", "SIGHUP")


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first such signal; later ones change nothing, so
    that a cleanup is not cut short. One that was ignored before (`nohup`) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)
        streams.leave_terminal()
        raise Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent(parent: int) -> None:
    """Be killed when the parent ends, however that ends; Linux only. End now where it has ended
    already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
