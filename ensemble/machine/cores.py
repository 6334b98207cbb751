"""How many cores this process may use. No torch: the command line asks before that is imported."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ensemble.machine import cgroups

THREADS = "OMP_NUM_THREADS"  # torch reads it when it is imported


@dataclass(frozen=True)
class Cores:
    """What there is, and what limits it; None where a platform does not say.

    Attributes:
        machine: of the machine.
        affinity: that the scheduler may place this process on (taskset, a cpuset).
        quota: the CPU time that its control groups allow, in cores (`docker run --cpus 1.5`).
    """

    machine: int | None
    affinity: int | None
    quota: float | None

    @property
    def usable(self) -> float | None:
        """The least of these."""
        known = (self.machine, self.affinity, self.quota)
        return min((number for number in known if number is not None), default=None)

    @property
    def whole(self) -> int | None:
        """Threads that can run at the same time: a part of a core counts as one."""
        return None if self.usable is None else max(1, math.ceil(self.usable))

    def words(self) -> str:
        """`2 cores`, `1 of 2 cores (CPU affinity)`, `1.5 of 2 cores (CPU quota)`."""
        if self.machine is None:
            return "an unknown number of cores"
        total = f"{self.machine} core{'' if self.machine == 1 else 's'}"
        if self.usable is None or self.usable == self.machine:
            return total
        limit = "affinity" if self.usable == self.affinity else "quota"
        return f"{self.usable:.3g} of {total} (CPU {limit})"


def find() -> Cores:
    """The cores of this process, now."""
    affinity = allowed()
    return Cores(os.cpu_count(), None if affinity is None else len(affinity), _quota())


def allowed() -> tuple[int, ...] | None:
    """The numbers of the cores that the scheduler may place this process on."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return tuple(sorted(os.sched_getaffinity(0)))


def default_threads(torch_has: int, cores: Cores, environment: Mapping[str, str]) -> int:
    """How many threads torch is to use where the user does not say.

    torch itself knows of `OMP_NUM_THREADS` and the affinity, not of a quota: threads beyond that
    use it up early in each period, and then all of them stand still.
    """
    if environment.get(THREADS) or cores.whole is None:
        return torch_has
    return min(torch_has, cores.whole)


def _quota() -> float | None:
    """In cores; the least of all groups that this process is in."""
    quotas = []
    for folder, version in cgroups.folders("cpu"):
        try:
            if version == 2:
                most, period = (folder / "cpu.max").read_text().split()
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                most, period = ((folder / name).read_text().strip() for name in names)
            if most not in ("max", "-1"):
                quotas.append(int(most) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)
