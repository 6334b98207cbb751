"""Why a run over ranks ended, reported once: by the rank that failed, or by a rank that lost it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading

from ensemble.bench.executors.ranks.exit_store import ExitStore
from ensemble.bench.executors.ranks.group import RankTimeoutError
from ensemble.errors import RankError, first_line
from ensemble.machine import launch

DETECTION_S = 5.0  # how long a rank may take to detect that another has ended
SHUTDOWN_S = 10.0  # how long it may then take to exit; torchrun kills 30 s after its first signal

_is_exiting, _got_sigterm = threading.Event(), threading.Event()


def install_sigterm_handler() -> None:
    """Handle SIGTERM, which torchrun sends when a rank has ended, outside of the main thread.

    The main thread usually detects the lost rank itself, by a closed connection, and then reports
    and saves. If it does not, it is interrupted; if it is stuck in a collective (NCCL waits for a
    lost rank) the process exits from here. The handler thread blocks on a pipe, which a signal
    wakes even while the main thread is in native code.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if launch.rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 stops, and the others follow
    threading.Thread(target=_await_sigterm, args=(reader,), daemon=True).start()


def report_failure(reason: str) -> None:
    """Record why this rank ends the run, and print it on stderr unless another rank does.

    Rank 0 has precedence.
    """
    _is_exiting.set()
    prefix = "" if launch.rank() == 0 else f"{launch.rank_name(launch.rank(), launch.host())}: "
    try:
        store = ExitStore()
        store.record_reason(reason)
        is_reported = launch.rank() > 0 and store.wait_for_report()
        is_reported = is_reported or not store.claim_report()
    except RuntimeError:  # torchrun itself has gone
        is_reported = False
    if not is_reported:
        print(f"error: {prefix}{reason}", file=sys.stderr, flush=True)


def diagnose(error: RankError) -> str:
    """The exit reason of the run, with its rank; called by rank 0 when a collective failed.

    Close this rank's connections first, so that the others detect the failure and record theirs.
    """
    reason, _ = _diagnose(error)
    return reason


def report_lost_rank(error: RankError) -> None:
    """Print the exit reason of the run on a follower, unless rank 0 does."""
    reason, store = _diagnose(error)
    if store is None or not (store.wait_for_report() or not store.claim_report()):
        print(f"error: {reason}", file=sys.stderr, flush=True)


def received_sigterm() -> bool:
    """Has this rank received SIGTERM, as torchrun sends when another has ended?"""
    return _got_sigterm.is_set()


def suppress_reports() -> None:
    """Rank 0 stops on the user's request: no rank has to report a reason."""
    _is_exiting.set()
    try:
        ExitStore().claim_report()
    except RuntimeError:
        return


def _diagnose(error: RankError) -> tuple[str, ExitStore | None]:
    symptom = first_line(error)
    _is_exiting.set()
    try:
        store = ExitStore()
        store.record_reason("")
        rank, reason = store.first_failure()
        if launch.rank() == 0:
            store.claim_report()
        name = None if rank is None else store.rank_name(rank)
    except RuntimeError:
        return f"lost the connection to the other ranks and to torchrun: {symptom}", None
    if reason:
        return f"{name}: {reason}", store
    if name is None:  # every rank is alive
        return symptom if received_sigterm() else f"the ranks lost each other: {symptom}", store
    if isinstance(error, RankTimeoutError):
        return f"{name}: no answer within --timeout_minutes", store
    return f"{name}: killed or crashed without reporting an error (out of memory?)", store


def _await_sigterm(reader: int) -> None:
    while os.read(reader, 1) != bytes([signal.SIGTERM]):  # each signal is one byte, its number
        continue
    _got_sigterm.set()
    if _is_exiting.wait(DETECTION_S):
        return
    _thread.interrupt_main()
    if _is_exiting.wait(SHUTDOWN_S):
        return
    if launch.rank() == 0:
        reason = diagnose(RankError("stopped by SIGTERM"))
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
