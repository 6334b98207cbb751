"""How much of the CPU other programs take."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ensemble.machine import cores, other_processes
from ensemble.machine.cores import Cores
from ensemble.machine.other_processes import Reading, share_of_others


def test_the_share_of_others_is_what_this_process_did_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "detect", lambda: Cores(4, None, None))
    before, after = Reading(10.0, 1.0, 100.0), Reading(12.0, 4.0, 107.0)
    assert share_of_others(before, after) == 0.5  # 7 busy seconds less 3 of its own, of 2 s x 4


def test_where_few_cores_are_needed_the_others_may_have_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Reading(0.0, 0.0, 0.0)
    of_others = {3.0: 0.0, 6.0: 0.0, 7.0: 0.5, 8.0: 1.0}  # cores they keep busy: share of our two

    def found(needed: int | None) -> dict[float, float | None]:
        return {
            busy: share_of_others(before, Reading(1.0, 0.0, busy), needed) for busy in of_others
        }

    monkeypatch.setattr(cores, "detect", lambda: Cores(8, 8, None))
    assert found(2) == of_others
    assert found(99) == {busy: busy / 8 for busy in of_others}
    monkeypatch.setattr(cores, "detect", lambda: Cores(8, 2, None))  # taskset -c 0,1
    assert found(None) == of_others


def test_an_unknown_reading_gives_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_processes, "_STAT", tmp_path / "none")
    assert share_of_others(other_processes.read(), other_processes.read()) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_busy_neighbour_is_seen_unless_it_belongs_to_this_program() -> None:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        took = -other_processes._cpu_seconds(neighbour.pid)
        before = other_processes.read(), other_processes.read([neighbour.pid])
        time.sleep(1.0)
        after = other_processes.read(), other_processes.read([neighbour.pid])
        took += other_processes._cpu_seconds(neighbour.pid)
        share, ours = map(share_of_others, before, after)
    finally:
        neighbour.kill()
        neighbour.wait()
    assert share is not None
    assert ours is not None
    expected = took / (
        cores.detect().max_threads or 1
    )  # of a second; beside others it gets less than all
    assert took > 0.1
    assert share > 0.7 * expected
    assert share == 1.0 or share - ours > 0.7 * expected - 0.05  # 1: all that is above is cut
