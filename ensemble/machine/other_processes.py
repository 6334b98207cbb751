"""CPU time of this program and of other processes: timings on a busy machine are unreliable."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.machine import cores
from ensemble.machine.cores import Cores

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """Seconds so far: wall clock, CPU time of this program, CPU time of the whole machine; and the
    cores there are."""

    wall_s: float
    own_s: float
    all_s: float | None
    cores: Cores


def read(own_pids: Sequence[int] = ()) -> Reading:
    """The current reading; the CPU time of the whole machine is reported on Linux only.

    own_pids: further processes of this program, whose CPU time counts as its own.
    """
    own_s = own_cpu_s(own_pids)
    try:
        # user nice system idle iowait irq softirq steal. steal: taken by other VMs on the host.
        ticks = [int(value) for value in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        busy = None
    return Reading(time.perf_counter(), own_s, busy, cores.detect())


def own_cpu_s(own_pids: Sequence[int] = ()) -> float:
    """CPU time so far of this process, its descendants, and further processes of this program."""
    ended = os.times()
    pids = {*own_pids, *_descendants(os.getpid())}
    own = time.process_time() + ended.children_user + ended.children_system
    return own + sum(map(_cpu_seconds, pids))


def busy_cores(
    own_pids: Sequence[int] = (), *, after_s: float = 0.02, for_s: float = 0.06
) -> float:
    """How many cores this program keeps busy while this thread sleeps.

    after_s: threads of OpenMP spin for some 5 ms after a parallel loop, which does not count.
    """
    time.sleep(after_s)
    before, begin = own_cpu_s(own_pids), time.perf_counter()
    time.sleep(for_s)
    return (own_cpu_s(own_pids) - before) / (time.perf_counter() - begin)


def share_of_others(before: Reading, after: Reading, needed: int | None = None) -> float | None:
    """The fraction of cores that other processes used between two readings, from 0 to 1.

    needed: the number of cores that this program keeps busy at most. Others may use the remaining
        cores without harm, and the fraction refers to the needed ones. Default: all usable cores.
    """
    found, wall = after.cores, after.wall_s - before.wall_s
    if before.all_s is None or after.all_s is None or not found.machine or wall <= 0:
        return None
    needed = min(needed or found.machine, found.max_threads or found.machine)
    others = ((after.all_s - before.all_s) - (after.own_s - before.own_s)) / wall
    return min(1.0, max(0.0, (others - (found.machine - needed)) / needed))


def _descendants(pid: int) -> Iterator[int]:
    """The processes that a process started, and theirs; none where the platform does not tell."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in map(int, path.read_text().split()):
                yield child
                yield from _descendants(child)


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; 0 if it has exited or the platform does not report it."""
    try:
        # Fields 14 and 15, utime and stime; counted from the end of the name, which may contain
        # spaces. See proc(5).
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0
