"""The control groups of this process: of a container, a batch job, a service. Linux only."""

from collections.abc import Iterator
from pathlib import Path

_OF_THIS_PROCESS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def folders(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders whose files limit this process, its own group's and those of all above it, each
    with the version of its interface, 1 or 2. Not all of them need exist.

    Source: the kernel's cgroup-v2.rst and cgroup-v1/cgroups.rst.
    """
    try:
        lines = _OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controllers
        # In a container the path may be that of the host: then only the root is there.
        for folder in dict.fromkeys([root, *(root / part for part in _and_parents(path))]):
            yield folder, 1 if controllers else 2


def _and_parents(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
