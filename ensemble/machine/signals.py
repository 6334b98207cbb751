"""Handle SIGTERM and SIGHUP like Ctrl-C, so that finished results are kept. Imports no torch."""

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

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Sent by a scheduler or `docker stop`, and by a closed terminal. Windows has no SIGHUP.
TERMINATION_SIGNALS = ("SIGTERM", "SIGHUP")


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on the first termination signal.

    Further signals are ignored, so that cleanup can finish. A signal that was ignored before
    (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in TERMINATION_SIGNALS if hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        streams.discard_without_terminal()
        raise Stopped(number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent exits (PR_SET_PDEATHSIG; Linux only).
    Exit now if the parent already has."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
