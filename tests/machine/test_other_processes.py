"""CPU utilization by other processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble.machine import cores, other_processes
from ensemble.machine.cores import Cores
from ensemble.machine.other_processes import Reading, share_of_others


def test_the_share_of_others_excludes_the_cpu_time_of_this_process() -> None:
    four = Cores(4, None, None)
    before, after = Reading(10.0, 1.0, 100.0, four), Reading(12.0, 4.0, 107.0, four)
    assert share_of_others(before, after) == 0.5  # 7 - 3 busy seconds of 2 s x 4 cores


def test_others_may_use_the_cores_that_this_program_does_not_need() -> None:
    of_others = {3.0: 0.0, 6.0: 0.0, 7.0: 0.5, 8.0: 1.0}  # their busy cores -> share of our two

    def found(needed: int | None, usable: Cores) -> dict[float, float | None]:
        before = Reading(0.0, 0.0, 0.0, usable)
        return {
            busy: share_of_others(before, Reading(1.0, 0.0, busy, usable), needed)
            for busy in of_others
        }

    assert found(2, Cores(8, 8, None)) == of_others
    assert found(99, Cores(8, 8, None)) == {busy: busy / 8 for busy in of_others}
    assert found(None, Cores(8, 2, None)) == of_others  # taskset -c 0,1


def test_an_unavailable_reading_yields_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_processes, "_STAT", tmp_path / "none")
    assert share_of_others(other_processes.read(), other_processes.read()) is None


def test_a_share_is_never_negative() -> None:
    """The two clocks tick apart: this program may seem to have used more than the machine."""
    four = Cores(4, None, None)
    assert share_of_others(Reading(0.0, 0.0, 0.0, four), Reading(1.0, 2.0, 1.9, four)) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_idle_cores_and_those_that_wait_for_a_disk_are_not_busy_but_stolen_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """user nice system idle iowait irq softirq steal, and guests, which are in user already."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9000 800 5 6 7 40 3\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(other_processes, "_STAT", stat)
    ticks = 100 + 20 + 30 + 5 + 6 + 7
    assert other_processes.read().all_s == ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform == "win32", reason="counts no children")
def test_what_a_child_has_used_counts_as_its_own_after_the_end_of_it() -> None:
    before, used = other_processes.own_cpu_s(), time.process_time()
    program = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    used = time.process_time() - used  # of this process
    assert other_processes.own_cpu_s() - before - used > 0.4


@pytest.fixture
def orphan() -> Iterator[int]:
    """The pid of a busy process that is no descendant of this one: its parent has ended."""
    shell = f"{sys.executable} -c 'while True: pass' > /dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_busy_process_is_counted_unless_it_belongs_to_this_program(orphan: int) -> None:
    took = -other_processes._cpu_seconds(orphan)
    before = other_processes.read(), other_processes.read([orphan])
    time.sleep(1.0)
    after = other_processes.read(), other_processes.read([orphan])
    took += other_processes._cpu_seconds(orphan)
    share, ours = map(share_of_others, before, after)
    assert share is not None
    assert ours is not None
    expected = took / (cores.detect().max_threads or 1)  # of 1 s; on a busy machine it gets less
    assert took > 0.1
    assert share > 0.7 * expected
    assert share == 1.0 or share - ours > 0.7 * expected - 0.05  # clamped to 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_this_program_has_started_counts_as_its_own() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    busy = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while (found := other_processes.busy_cores(for_s=0.2)) < 0.3:
            assert time.monotonic() < deadline
        before = other_processes.own_cpu_s()
    finally:
        os.killpg(busy.pid, signal.SIGKILL)
        busy.wait()
    assert found < 2.5
    assert before > 0


def test_a_program_that_waits_keeps_no_core_busy() -> None:
    assert other_processes.busy_cores() < 0.2
