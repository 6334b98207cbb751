"""The control groups (cgroups) of this process: a container, batch job or service. Linux only."""

from collections.abc import Iterator
from pathlib import Path

_PROC_CGROUP, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def directories(controller: str) -> Iterator[tuple[Path, int]]:
    """The cgroup directories whose files limit this process, its own and all of its ancestors',
    each with its interface version, 1 or 2. They need not exist.

    Source: the kernel's cgroup-v2.rst and cgroup-v1/cgroups.rst.
    """
    try:
        lines = _PROC_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controllers
        # In a container the path may be the host's, of which only the root is mounted.
        for directory in dict.fromkeys([root, *(root / prefix for prefix in _prefixes(path))]):
            yield directory, 1 if controllers else 2


def _prefixes(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
