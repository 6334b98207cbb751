"""The usable cores of a process, and the default number of torch threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ensemble.bench import environment
from ensemble.machine import cgroups, cores, devices
from ensemble.machine.cores import Cores, default_threads
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("found", "max_threads", "text"),
    [
        (Cores(8, 8, None), 8, "8 cores"),
        (Cores(1, 1, None), 1, "1 core"),
        (Cores(8, 3, None), 3, "3 of 8 cores (CPU affinity)"),
        (Cores(8, 8, 1.5), 2, "1.5 of 8 cores (CPU quota)"),
        (Cores(8, 4, 0.25), 1, "0.25 of 8 cores (CPU quota)"),
        (Cores(8, 1, 1.5), 1, "1 of 8 cores (CPU affinity)"),
        (Cores(8, None, 16.0), 8, "8 cores"),
        (Cores(None, None, None), None, "an unknown number of cores"),
    ],
)
def test_the_usable_cores_are_the_minimum_of_machine_affinity_and_quota(
    found: Cores, max_threads: int | None, text: str
) -> None:
    assert found.max_threads == max_threads
    assert found.describe() == text


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(cgroups, "_PROC_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    return tmp_path


def test_the_quota_is_the_minimum_over_the_cgroup_and_its_ancestors(groups: Path) -> None:
    """In the formats of the kernel's cgroup-v2.rst: `max 100000`, `150000 100000`."""
    assert cores.detect().quota is None
    write(groups, cgroup="0::/job/step\n", cpu__max="max 100000\n")
    assert cores.detect().quota is None
    write(groups / "job", cpu__max="150000 100000\n")
    write(groups / "job" / "step", cpu__max="800000 100000\n")
    assert cores.detect().quota == 1.5


def test_a_quota_of_cgroup_v1_is_read(groups: Path) -> None:
    write(groups, cgroup="3:cpu,cpuacct:/docker/1\n2:memory:/docker/1\n")
    folder = groups / "cpu,cpuacct"  # in a container only the root of the path is mounted
    write(folder, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cores.detect().quota is None
    write(folder, cpu__cfs_quota_us="50000\n")
    assert cores.detect().quota == 0.5


def test_omp_num_threads_takes_precedence_over_the_core_limits() -> None:
    assert default_threads(8, Cores(8, 8, None), {}) == 8
    assert default_threads(8, Cores(8, 8, 1.5), {}) == 2
    assert default_threads(4, Cores(8, 8, None), {}) == 4  # torch does not count hyperthreads
    assert default_threads(6, Cores(8, 8, 1.5), {"OMP_NUM_THREADS": "6"}) == 6
    assert default_threads(8, Cores(None, None, None), {}) == 8


def test_configure_sets_torch_threads_and_the_environment_records_them(groups: Path) -> None:
    before = torch.get_num_threads()
    write(groups, cgroup="0::/\n", cpu__max="50000 100000\n")
    try:
        torch.set_num_threads(2)
        devices.configure(threads=None)
        cpu = torch.device("cpu")
        recorded = environment.describe(
            cpu, allocator="system", weights="none", first_forward_s=0.1
        )
        assert (recorded.threads, recorded.cores, recorded.usable_cores) == (1, os.cpu_count(), 0.5)
        devices.configure(threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
@pytest.mark.parametrize("threads", [None, "2"])
def test_a_process_pinned_to_one_core_uses_one_thread_by_default(threads: str | None) -> None:
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch\n"
        "from ensemble.machine import cores, devices\n"
        "devices.configure(threads=None)\n"
        "print(torch.get_num_threads(), cores.detect().describe())"
    )
    environment = {**os.environ} | ({"OMP_NUM_THREADS": threads} if threads else {})
    if not threads:
        environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"{threads or 1} 1 ")
