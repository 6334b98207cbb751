"""Real ranks of torchrun, few and small: what they find, what they refuse, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import resnet_vmap
from ensemble.records import Run
from ensemble.report import exports
from tests.checkpoints import SMALL, trained

ROOT = Path(resnet_vmap.__file__).parent
QUICK = ["--arch", SMALL, "--image_path", str(ROOT / "kitten.jpg"), "--image_size", "32"]
QUICK += ["--warmup", "0", "--min_pairs", "6", "--min_seconds", "0", "--timeout_minutes", "1"]
MODELS = 5  # over two ranks: three and two


class Ranks:
    """Runs of the program, one after another in the same two ranks."""

    def __init__(self, folder: Path, runs: list[dict[str, object]]) -> None:
        self.folder = folder
        (folder / "runs.json").write_text(json.dumps(runs))
        command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
        self.begin = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *command, str(Path(__file__).with_name("ranks.py")), str(folder)],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(folder)}
            | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> float:
        """Wait for their end; the seconds that they took."""
        try:
            self.process.communicate(timeout=100)
        finally:
            self.process.kill()
        return time.monotonic() - self.begin

    def said(self, name: str, rank: int) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of one rank in one run."""
        found = json.loads((self.folder / f"{name}.{rank}.json").read_text())
        return found["code"], found["out"], found["err"]

    def error(self, name: str) -> str:
        """The one line of a run that rank 0 refuses and of which rank 1 says nothing."""
        code, _, err = self.said(name, 0)
        assert code == 2
        assert self.said(name, 1)[1:] == ("", "")
        (line,) = err.splitlines()
        return str(line)

    def run(self, name: str) -> Run:
        """A result file."""
        return exports.read(str(self.folder / f"{name}.json"), argument=name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    for seed in range(MODELS):
        torch.save(trained(SMALL, classes=10, seed=seed).state_dict(), folder / f"{seed}.pth")
    return [str(folder / f"{seed}.pth") for seed in range(MODELS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> Ranks:
    """All runs that end by themselves, in one torchrun; the last is one of a rank that is late."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "bad.pth").write_text("<!DOCTYPE html>")
    models = [*QUICK, "--model_path", *files]
    bad = [*files[:4], str(folder / "bad.pth")]

    def export(name: str) -> list[str]:
        return ["--export_json", str(folder / f"{name}.json")]

    mean = ["--reduce", "mean", "--strategies", "vmap", "fail"]
    tenants = ["--inputs", "per_model", "--strategies", "vmap"]
    late = ["--strategies", "loop", "slow", "--timeout_minutes", "0.03"]
    own = Ranks(
        folder,
        [
            {"name": "logits", "argv": [*models, *export("shared"), "--max_minutes", "1e-6"]},
            {"name": "rest", "argv": [*models, "--resume", str(folder / "shared.json")]},
            {"name": "mean", "argv": [*models, *mean, *export("mean_run")]},
            {
                "name": "tenants",
                "argv": [*models, *tenants, *export("tenants_run")],
            },
            {"name": "bad", "argv": [*QUICK, "--model_path", *bad]},
            {"name": "seeds", "argv": [*QUICK], "rank 1": ["--seed", "1"]},
            {"name": "few", "argv": [*QUICK, "--num_models", "1"]},
            {"name": "late", "argv": [*models, *late, *export("late_run")]},
        ],
    )
    own.finish()
    return own


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, files: list[str]
) -> dict[str, list[list[int]] | None]:
    """The classes that one process finds for the same files and views."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for inputs in ("shared", "per_model"):
        path = str(folder / f"{inputs}.json")
        argv = [*QUICK, "--model_path", *files, "--inputs", inputs, "--strategies", "loop"]
        assert resnet_vmap.main([*argv, "--processes", "0", "--export_json", path]) == 0
        (found[inputs],) = (row.top1 for row in exports.read(path, argument="").results)
    return found


def test_ranks_find_the_classes_that_one_process_finds(
    ranks: Ranks, alone: dict[str, list[list[int]] | None]
):
    for name, inputs in (("shared", "shared"), ("tenants_run", "per_model")):
        rows = ranks.run(name).results
        assert {row.status for row in rows} == {"ok"}
        assert all(row.top1 == alone[inputs] for row in rows)
        assert all((row.max_rel_error or 0.0) < 1e-5 for row in rows)


def test_a_run_that_was_stopped_is_resumed_and_says_where_it_was_made(ranks: Ranks):
    assert "not finished: vmap, 5 models" in ranks.said("logits", 0)[2]
    assert ranks.said("rest", 0)[0] == 0
    run = ranks.run("shared")
    assert [row.case.strategy for row in run.results] == ["loop", "vmap"]
    environment = run.environment
    assert (environment.ranks, environment.backend, environment.threads) == (2, "gloo", 1)
    assert environment.hosts is not None
    assert len(environment.hosts) == len(environment.rank_devices or ()) == 2


def test_a_call_is_told_apart_into_the_slowest_shard_communication_and_interference(ranks: Ranks):
    for row in ranks.run("shared").results:
        (process,) = row.processes
        rounds = process.whole_s, process.forward_s, process.alone_s, process.one_rank_s
        assert [len(times) for times in rounds] == [5] * 4
        parts = row.parallel_efficiency, row.interference, row.communication
        assert sum(part or 0.0 for part in parts) == pytest.approx(1.0)
        assert row.speedup_over_one_rank is not None
    out = ranks.said("rest", 0)[1]
    assert "vmap, 5 models, 2 ranks: parallel efficiency " in out
    assert "times as fast as one rank with all models" in out


def test_the_mean_is_served_by_ranks_and_a_rank_that_breaks_fails_its_row_only(ranks: Ranks):
    rows = {row.case.strategy: row for row in ranks.run("mean_run").results}
    assert rows["vmap"].status == "ok"
    assert rows["vmap"].speedup is not None
    host = (ranks.run("mean_run").environment.hosts or ("",))[1]
    assert rows["fail"].error == f"rank 1 on {host}: RuntimeError: broke"


def test_what_one_rank_cannot_do_is_refused_by_its_name_before_anything_is_timed(ranks: Ranks):
    assert "rank 1 on " in ranks.error("bad")
    assert "bad.pth: expected a checkpoint file, found an HTML page" in ranks.error("bad")
    assert "expected --seed 0 like rank 0, found 1" in ranks.error("seeds")
    assert ranks.error("few") == (
        "error: --num_models: expected at least 2, one for each rank, found 1"
    )


def test_a_rank_that_says_nothing_is_given_up_by_name_and_rows_before_it_are_kept(ranks: Ranks):
    code, out, err = ranks.said("late", 0)
    assert code == 1
    assert ": no answer within --timeout_minutes: 1 of 2 rows are finished" in err
    assert err.splitlines()[-1].startswith("rank 1 on ")
    assert "1 (reference)" in out
    assert [row.case.strategy for row in ranks.run("late_run").results] == ["loop"]


def test_killed_and_interrupted_runs_end_soon_and_leave_a_whole_file_and_the_cause(
    tmp_path: Path, files: list[str]
):
    """Side by side, because both wait most of the time."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "stopped").mkdir()
    models = [*QUICK, "--model_path", *files]
    argv = [*models, "--strategies", "loop", "kill", "vmap"]
    argv += ["--export_json", str(tmp_path / "killed" / "run.json")]
    killed = Ranks(tmp_path / "killed", [{"name": "end", "argv": argv}])
    argv = [*models, "--batch_size", *map(str, range(1, 200))]
    target = tmp_path / "stopped" / "run.json"
    stopped = Ranks(
        tmp_path / "stopped", [{"name": "end", "argv": [*argv, "--export_json", str(target)]}]
    )
    while not target.exists() and stopped.process.poll() is None:
        time.sleep(0.05)
    stopped.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    stopped.finish()
    assert time.monotonic() - begin < 60
    assert killed.finish() < 60 + 40  # the start of both, and the 60 s that an end may take
    assert killed.process.returncode
    assert stopped.process.returncode

    code, out, err = killed.said("end", 0)
    assert code == 1
    assert ": killed or crashed, it ended without a word (out of memory?): 1 of 3 rows" in err
    assert err.splitlines()[-1].startswith("rank 1 on ")
    assert "1 (reference)" in out
    assert [row.case.strategy for row in killed.run("run").results] == ["loop"]

    code, _, err = stopped.said("end", 0)
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert 0 < len(stopped.run("run").results) < 398
