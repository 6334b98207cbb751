"""Why a run over ranks ended, said once: by the rank that knows, or by those that are left."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading

from ensemble.bench.executors.ranks.exit_store import Board
from ensemble.machine import launch

NOTICE_S = 5.0  # how long a rank may take to notice by itself that another has ended
GIVE_UP_S = 10.0  # and then to stop; torchrun kills 30 s after its first signal

_noticed, _terminated = threading.Event(), threading.Event()


def watch() -> None:
    """Take SIGTERM, which torchrun sends where a rank has ended, apart from the main thread.

    That one mostly notices by itself, from a connection that is closed, and has something to say
    and to save. Where it does not it is interrupted, and where it is stuck in a collective (NCCL
    waits for a rank that is gone) the process ends here. The thread sleeps until then: what a
    signal writes into the pipe wakes it even while the main thread is in foreign code.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if launch.rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 stops, and with it the others
    threading.Thread(target=_await_sigterm, args=(reader,), daemon=True).start()


def tell(cause: str) -> None:
    """Say, in one line on stderr, why this rank ends the run. Rank 0 speaks first."""
    _noticed.set()
    who = "" if launch.rank() == 0 else f"{launch.rank_name(launch.rank(), launch.host())}: "
    try:
        board = Board()
        board.write(cause)
        said = launch.rank() > 0 and board.wait_until_said()
        said = said or not board.say()
    except RuntimeError:  # torchrun itself has gone
        said = False
    if not said:
        print(f"error: {who}{cause}", file=sys.stderr, flush=True)


def found(symptom: str) -> str:
    """Which rank has ended, and why: asked on rank 0 where a step could not be taken together.

    To be called with this rank's connections closed, so that the others notice as well.
    """
    cause, _ = _ask(symptom)
    return cause


def noticed(symptom: str) -> None:
    """The same on another rank, which says it if rank 0 does not."""
    cause, board = _ask(symptom)
    if board is None or not (board.wait_until_said() or not board.say()):
        print(f"error: {cause}", file=sys.stderr, flush=True)


def was_terminated() -> bool:
    """Was this rank told to stop by SIGTERM, as torchrun does where another has ended?"""
    return _terminated.is_set()


def quiet() -> None:
    """Rank 0 stops by itself: nobody has to say why."""
    _noticed.set()
    try:
        Board().say()
    except RuntimeError:
        return


def _ask(symptom: str) -> tuple[str, Board | None]:
    _noticed.set()
    try:
        board = Board()
        board.write("")
        rank, cause = board.read()
        if launch.rank() == 0:
            board.say()
        name = None if rank is None else board.name(rank)
    except RuntimeError:
        return f"the connection to the other ranks and to torchrun is lost: {symptom}", None
    if cause:
        return f"{name}: {cause}", board
    if name is None:  # none of the ranks is to blame
        return symptom if was_terminated() else f"the ranks lost each other: {symptom}", board
    if "imed out" in symptom or "imeout" in symptom:
        return f"{name}: no answer within --timeout_minutes", board
    return f"{name}: killed or crashed without reporting an error (out of memory?)", board


def _await_sigterm(reader: int) -> None:
    while os.read(reader, 1) != bytes([signal.SIGTERM]):  # each signal is one byte, its number
        continue
    _terminated.set()
    if _noticed.wait(NOTICE_S):
        return
    _thread.interrupt_main()
    if _noticed.wait(GIVE_UP_S):
        return
    if launch.rank() == 0:
        print(f"error: {found('stopped by SIGTERM')}", file=sys.stderr, flush=True)
    os._exit(1)
