"""The CPU cores this process may use. Imports no torch: the command line needs it first."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ensemble.machine import cgroups

THREADS = "OMP_NUM_THREADS"  # read by torch at import


@dataclass(frozen=True)
class Cores:
    """The number of cores and its limits; None where the platform does not report it.

    Attributes:
        machine: cores of the machine.
        affinity: cores in the CPU affinity mask of this process (taskset, cpuset).
        quota: CPU quota of its cgroups, in cores (`docker run --cpus 1.5`).
    """

    machine: int | None
    affinity: int | None
    quota: float | None

    @property
    def usable(self) -> float | None:
        """The smallest of these limits, in cores."""
        known = (self.machine, self.affinity, self.quota)
        return min((number for number in known if number is not None), default=None)

    @property
    def max_threads(self) -> int | None:
        """Threads that can run simultaneously: `usable` rounded up."""
        return None if self.usable is None else max(1, math.ceil(self.usable))

    def describe(self) -> str:
        """`2 cores`, `1 of 2 cores (CPU affinity)`, `1.5 of 2 cores (CPU quota)`."""
        if self.machine is None:
            return "an unknown number of cores"
        total = f"{self.machine} core{'' if self.machine == 1 else 's'}"
        if self.usable is None or self.usable == self.machine:
            return total
        limit = "affinity" if self.usable == self.affinity else "quota"
        return f"{self.usable:.3g} of {total} (CPU {limit})"


def detect() -> Cores:
    """The current core count and limits of this process."""
    allowed = affinity()
    return Cores(os.cpu_count(), None if allowed is None else len(allowed), _quota())


def affinity() -> tuple[int, ...] | None:
    """The CPU affinity mask of this process as sorted core numbers; None where unsupported."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return tuple(sorted(os.sched_getaffinity(0)))


def default_threads(torch_has: int, cores: Cores, environment: Mapping[str, str]) -> int:
    """The number of torch threads where the user does not set one.

    torch respects `OMP_NUM_THREADS` and the affinity mask but not a CPU quota: surplus threads
    exhaust it early in each scheduling period, and then all threads are throttled.
    """
    if environment.get(THREADS) or cores.max_threads is None:
        return torch_has
    return min(torch_has, cores.max_threads)


def _quota() -> float | None:
    """The smallest CPU quota of the cgroups of this process, in cores."""
    quotas = []
    for directory, version in cgroups.directories("cpu"):
        try:
            if version == 2:
                limit, period = (directory / "cpu.max").read_text().split()
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                limit, period = ((directory / name).read_text().strip() for name in names)
            if limit not in ("max", "-1"):
                quotas.append(int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)
