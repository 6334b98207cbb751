"""Two real ranks of torchrun: results, rejected input, timeouts, and exit reasons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ensemble
from ensemble.bench.report import exports
from ensemble.bench.summary import Run
from ensemble.models.images import augmented, read_image
from tests.checkpoints import trained

ROOT = Path(ensemble.__file__).parents[1]
PROGRAM = Path(__file__).with_name("torchrun_program.py")
IMAGE = ROOT / "kitten.jpg"
ARCH = "squeezenet1_1"  # 0.7 million weights and few modules: quick to read and to build
QUICK = ["--arch", ARCH, "--image_path", str(IMAGE), "--image_size", "32"]
QUICK += ["--warmup", "0", "--min_pairs", "6", "--min_seconds", "0", "--timeout_minutes", "1"]
MODELS = 5  # over two ranks: three and two


class Ranks:
    """Runs of the program, in sequence in the same two ranks."""

    def __init__(self, folder: Path, runs: list[dict[str, object]]) -> None:
        self.folder = folder
        (folder / "runs.json").write_text(json.dumps(runs))
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        self.process = subprocess.Popen(
            [
                sys.executable,
                *command,
                str(Path(__file__).with_name("torchrun_program.py")),
                str(folder),
            ],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(folder), "COLUMNS": "1000"}
            | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> None:
        """Wait for the ranks, which exit with a failure."""
        try:
            self.process.communicate(timeout=100)
        finally:
            self.process.kill()
        assert self.process.returncode

    def output(self, name: str, rank: int) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of one rank in one run."""
        found = json.loads((self.folder / f"{name}.{rank}.json").read_text())
        return found["code"], found["out"], found["err"]

    def error(self, name: str) -> str:
        """The only line of a run that rank 0 rejects; rank 1 prints nothing."""
        code, _, err = self.output(name, 0)
        assert code == 2
        assert self.output(name, 1)[1:] == ("", "")
        (line,) = err.splitlines()
        return str(line)

    def run(self, name: str) -> Run:
        """A result file."""
        return exports.read(str(self.folder / f"{name}.json"), argument=name)


def checkpoints(folder: Path) -> list[str]:
    for seed in range(MODELS):
        torch.save(trained(ARCH, classes=10, seed=seed).state_dict(), folder / f"{seed}.pth")
    return [str(folder / f"{seed}.pth") for seed in range(MODELS)]


def all_runs(folder: Path, files: list[str]) -> Ranks:
    """All runs, in one torchrun; a rank is killed in the last."""
    (folder / "bad.pth").write_text("<!DOCTYPE html>")
    models = [*QUICK, "--model_path", *files, "--strategies"]
    bad = [*files[:4], str(folder / "bad.pth")]

    def export(name: str) -> list[str]:
        return ["--export_json", str(folder / f"{name}.json")]

    both = [*models, "loop", "vmap"]
    mean = [*models, "loop", "fail", "--reduce", "mean"]
    late = [*models, "loop", "slow", "--timeout_minutes", "0.03"]
    stopped = [*models, "loop", "stop", "vmap"]
    killed = [*models, "loop", "kill", "vmap"]
    runs: list[dict[str, object]] = [
        {"name": "first", "argv": [*both, *export("shared"), "--max_minutes", "1e-6"]},
        {"name": "rest", "argv": [*both, "--resume", str(folder / "shared.json")]},
        {"name": "mean", "argv": [*mean, *export("mean_run")]},
        {
            "name": "tenants",
            "argv": [*models, "loop", "--inputs", "per_model", *export("tenants_run")],
        },
        {"name": "bad", "argv": [*QUICK, "--model_path", *bad]},
        {"name": "seeds", "argv": [*QUICK], "rank 1": ["--seed", "1"]},
        {"name": "few", "argv": [*QUICK, "--num_models", "1"]},
        {"name": "processes", "argv": [*QUICK, "--processes", "2"]},
        {"name": "help", "argv": ["--help"]},
        {"name": "late", "argv": [*late, *export("late_run")]},
        {"name": "stopped", "argv": [*stopped, *export("stopped_run")]},
        {"name": "killed", "argv": [*killed, *export("killed_run")]},
    ]
    ranks = Ranks(folder, runs)
    ranks.finish()
    return ranks


@pytest.mark.slow
def test_two_ranks_measure_reject_bad_input_and_report_exit_reasons(
    tmp_path: Path,
) -> None:
    """One torchrun, because each imports torch in two ranks."""
    files = checkpoints(tmp_path)
    ranks = all_runs(tmp_path, files)
    outputs_agree(ranks)
    for name, inputs in (("shared", "shared"), ("tenants_run", "per_model")):
        expected = classes_of_one_process(files, inputs)
        assert all(row.top1 == expected for row in ranks.run(name).results)
    a_stopped_run_is_resumed_and_records_its_environment(ranks)
    a_call_is_attributed_to_the_slowest_shard_communication_and_interference(ranks)
    a_mean_is_reduced_and_a_rank_that_raises_fails_its_row_only(ranks)
    an_error_of_one_rank_is_reported_by_its_name_before_anything_is_timed(ranks)
    inapplicable_options_are_rejected_and_help_is_printed_once(ranks)
    a_hanging_rank_times_out_by_name_and_earlier_rows_are_kept(ranks)
    an_interrupted_run_keeps_its_finished_rows(ranks)
    a_killed_rank_ends_the_run_soon_by_name_and_finished_rows_are_kept(ranks)


def classes_of_one_process(files: list[str], inputs: str) -> list[list[int]]:
    models = ensemble.load_models(files, arch=ARCH, device="cpu")
    images = augmented(read_image(str(IMAGE)), MODELS, image_size=32, seed=0)
    example = images[:1] if inputs == "shared" else images.unsqueeze(1)
    logits = ensemble.build("loop", models, example)(example)
    return logits.argmax(-1).tolist()


def outputs_agree(ranks: Ranks) -> None:
    rows = [*ranks.run("shared").results, *ranks.run("tenants_run").results]
    assert {row.status for row in rows} == {"ok"}
    assert all((row.max_rel_error or 0.0) < 1e-5 for row in rows)


def a_stopped_run_is_resumed_and_records_its_environment(ranks: Ranks) -> None:
    assert "than requested: vmap, 5 models" in ranks.output("first", 0)[2]
    assert ranks.output("rest", 0)[0] == 0
    run = ranks.run("shared")
    assert [row.case.strategy for row in run.results] == ["loop", "vmap"]
    environment = run.environment
    assert (environment.ranks, environment.backend, environment.threads) == (2, "gloo", 1)
    assert environment.hosts is not None
    assert len(environment.hosts) == len(environment.rank_devices or ()) == 2


def a_call_is_attributed_to_the_slowest_shard_communication_and_interference(
    ranks: Ranks,
) -> None:
    for row in ranks.run("shared").results:
        times = row.ranks
        assert times is not None
        rounds = times.whole_s, times.forward_s, times.alone_s, times.one_rank_s
        assert [len(times) for times in rounds] == [5] * 4
        parts = times.parallel_efficiency, times.interference, times.communication
        assert sum(part or 0.0 for part in parts) == pytest.approx(1.0)
        assert times.speedup_over_one_rank is not None
    out = ranks.output("rest", 0)[1]
    assert "vmap, 5 models, 2 ranks: parallel efficiency " in out
    assert "x over one rank with all models" in out


def a_mean_is_reduced_and_a_rank_that_raises_fails_its_row_only(ranks: Ranks) -> None:
    run = ranks.run("mean_run")
    rows = {row.case.strategy: row for row in run.results}
    assert rows["loop"].status == "ok"
    host = (run.environment.hosts or ("",))[1]
    assert rows["fail"].error == f"rank 1 on {host}: RuntimeError: broke"


def an_error_of_one_rank_is_reported_by_its_name_before_anything_is_timed(ranks: Ranks) -> None:
    assert "rank 1 on " in ranks.error("bad")
    assert "bad.pth: expected a checkpoint file, got an HTML page" in ranks.error("bad")
    assert "expected --seed 0 like rank 0, got 1" in ranks.error("seeds")
    assert ranks.error("few") == (
        "error: --num_models: expected at least 2, one for each rank, got 1"
    )


def inapplicable_options_are_rejected_and_help_is_printed_once(ranks: Ranks) -> None:
    message = "cannot be combined with torchrun: rows are measured in its ranks"
    assert ranks.error("processes") == f"error: --processes: {message}"
    code, out, _ = ranks.output("help", 0)
    assert code == 0
    assert "torchrun --nproc_per_node 2" in " ".join(out.split())
    assert ranks.output("help", 1) == (0, "", "")


def a_hanging_rank_times_out_by_name_and_earlier_rows_are_kept(ranks: Ranks) -> None:
    code, out, err = ranks.output("late", 0)
    assert code == 1
    assert ": no answer within --timeout_minutes: 1 of 2 rows are finished" in err
    assert err.splitlines()[-1].startswith("rank 1 on ")
    assert "1 (reference)" in out
    assert [row.case.strategy for row in ranks.run("late_run").results] == ["loop"]


def an_interrupted_run_keeps_its_finished_rows(ranks: Ranks) -> None:
    code, _, err = ranks.output("stopped", 0)
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted: 1 of 3 rows are finished")
    assert ranks.output("stopped", 1)[1:] == ("", "")
    assert [row.case.strategy for row in ranks.run("stopped_run").results] == ["loop"]


def a_killed_rank_ends_the_run_soon_by_name_and_finished_rows_are_kept(ranks: Ranks) -> None:
    code, out, err = ranks.output("killed", 0)
    assert code == 1
    assert ": killed or crashed without reporting an error (out of memory?): 1 of 3 rows" in err
    assert err.splitlines()[-1].startswith("rank 1 on ")
    assert "1 (reference)" in out
    assert [row.case.strategy for row in ranks.run("killed_run").results] == ["loop"]
    files = [ranks.folder / f"{name}.0.json" for name in ("stopped", "killed")]
    before, after = (file.stat().st_mtime for file in files)
    assert after - before < 60
