"""How busy the machine is with other programs: timings beside a busy neighbour mislead."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.machine import cores

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """Seconds so far: of the wall clock, of this process on all cores, of all work on all cores."""

    wall_s: float
    own_s: float
    all_s: float | None


def read(beside: Sequence[int] = ()) -> Reading:
    """The readings of this moment; what the whole machine did is known on Linux only.

    `beside` are processes of this program: theirs is no other program's time.
    """
    own_s = time.process_time() + sum(map(_seconds_of, beside))
    try:
        # user nice system idle iowait irq softirq steal: steal is other machines' on this host.
        ticks = [int(value) for value in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        busy = None
    return Reading(time.perf_counter(), own_s, busy)


def share_of_others(before: Reading, after: Reading, needed: int | None = None) -> float | None:
    """The share of the machine's cores that other programs took between two readings, 0 to 1.

    needed: where this program keeps so many cores busy at most, the others may have all else, and
        the share is that of these cores. Without: all that this process may use.
    """
    found, wall = cores.find(), after.wall_s - before.wall_s
    if before.all_s is None or after.all_s is None or not found.machine or wall <= 0:
        return None
    needed = min(needed or found.machine, found.whole or found.machine)
    others = ((after.all_s - before.all_s) - (after.own_s - before.own_s)) / wall
    return min(1.0, max(0.0, (others - (found.machine - needed)) / needed))


def _seconds_of(pid: int) -> float:
    """CPU time of a process so far; 0 where it has ended, or the platform does not tell."""
    try:
        # After the name, which may hold spaces: utime and stime are fields 14 and 15, see proc(5).
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0
