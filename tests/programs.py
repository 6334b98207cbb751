"""Programs that tests start: modules of theirs (`python -m tests.NAME`), and the command itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A shell's background job, as a gate may be, ignores SIGINT and hands that on; nohup does so with
# SIGHUP.
COMMAND = (
    "import signal, sys, resnet_vmap\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "sys.exit(resnet_vmap.main(sys.argv[1:]))"
)


def assert_passes(module: str) -> None:
    """Run a module in a separate process: a wrong kernel may hang or crash it."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@dataclass(frozen=True)
class Ended:
    """How the command ended after a signal.

    Attributes:
        err: what it printed on stderr after the line that the signal came at.
        children: the processes that it had started by then.
        children_s: until none of them was left, from the signal on; at most 10.
    """

    code: int
    out: str
    err: str
    children: list[int]
    children_s: float


def signaled(
    argv: Sequence[str],
    number: signal.Signals,
    *,
    at: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Run the command, and send it a signal once a line of stderr begins with `at`."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *argv],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            before = list[str]()
            for line in process.stderr:
                before.append(line)
                if line.startswith(at):
                    break
            else:
                raise AssertionError(f"no line begins with {at!r}:\n{''.join(before)[-6000:]}")
            children = _children(process.pid)
            process.send_signal(number)
            begin = time.monotonic()
            while time.monotonic() < begin + 10 and any(map(_is_there, children)):
                time.sleep(0.01)
            children_s = time.monotonic() - begin
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # left running, it would be blamed on a later test
    return Ended(process.returncode, out, err, children, children_s)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr  # 1: there are none
    return [int(line) for line in found.stdout.split()]


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
