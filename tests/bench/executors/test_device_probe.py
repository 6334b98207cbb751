"""A run on an accelerator: its workers alone use it, also for what is printed before the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_vmap
from ensemble.bench import first_forward, summary
from ensemble.bench.executors import device_probe
from ensemble.bench.executors.device_probe import Probe
from ensemble.bench.first_forward import FirstForward
from ensemble.bench.report import exports
from ensemble.bench.roofline import Limits
from ensemble.errors import InputError
from tests.checkpoints import SMALL, trained
from tests.made import CONFIG, ENVIRONMENT

ROOT = Path(resnet_vmap.__file__).parent
QUICK = ["--image_path", str(ROOT / "kitten.jpg"), "--image_size", "32", "--warmup", "0"]
QUICK += ["--min_pairs", "6", "--min_seconds", "0", "--threads", "1", "--arch", SMALL]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.save(trained(SMALL, classes=10, seed=7).state_dict(), tmp_path / "small.pth")
    return str(tmp_path / "small.pth")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """This process finds a CUDA device, and fails if it uses it. Workers find one that computes on
    the CPU, or refuses them with the error that is given."""

    def fail() -> None:
        raise AssertionError("CUDA was initialized")

    def plant(error: str) -> None:
        code = "from tests.bench.executors.simulated_accelerator import install"
        (tmp_path / "sitecustomize.py").write_text(f"{code}; install({error!r})\n")

    plant("")
    cuda = torch.device("cuda")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: cuda
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    monkeypatch.setattr(torch.accelerator, "set_device_index", fail)
    monkeypatch.setattr(summary, "TOO_BUSY", 1.0)
    return plant


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The strategies of each worker that was started, in order."""
    popen, found = subprocess.Popen, list[list[str]]()

    def start(command: list[str], *rest: Any, **options: Any) -> subprocess.Popen[str]:
        if command[1] == "-P":
            _, *strategies, device = command[7:]
            assert device == "cuda"
            found.append(strategies)
        return popen(command, *rest, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_workers_alone_use_the_accelerator_and_measure_a_grid_point_each(
    checkpoint: str,
    tmp_path: Path,
    accelerator: Callable[[str], None],
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows, predictions, the first forward and the limits are there, though this process would fail
    if it called CUDA once."""
    target = tmp_path / "run.json"
    argv = [*QUICK, "--model_path", checkpoint, "--num_models", "1", "2", "--processes", "1"]
    argv += ["--strategies", "loop", "vmap", "folded_vmap", "--roofline"]
    assert resnet_vmap.main([*argv, "--export_json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "Running on cuda, the accelerator here (auto-detected)" in out
    assert out.count("Prediction: class ") == 1
    run = exports.read(str(target), argument="")
    assert run.environment.first_forward_s > 0
    assert run.environment.argv == tuple(sys.argv)
    assert str(checkpoint) in run.environment.weights
    names = [(row.case.strategy, row.case.num_models) for row in run.results]
    assert names == [(n, c) for c in (1, 2) for n in ("loop", "vmap", "folded_vmap")]
    assert [len(row.processes) for row in run.results] == [1] * 6
    assert all(row.roofline and row.roofline.least_s for row in run.results)
    # The probe, then a process for each N.
    assert [sorted(strategies) for strategies in started] == [[], *[["folded_vmap", "vmap"]] * 2]


def test_predictions_of_the_probe_are_those_of_this_process(
    checkpoint: str,
    accelerator: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "loop", "--processes"]
    printed = []
    for rest in (["1", "--verbose"], ["0", "--verbose", "--device", "cpu"]):
        assert resnet_vmap.main([*argv, *rest]) == 0
        out = capsys.readouterr().out
        printed.append(out[out.index("Running Sample") : out.index("Serving multiple")])
    assert printed[0] == printed[1]
    assert "  top 5: class " in printed[0]


def test_an_accelerator_without_free_memory_is_one_line_with_torchs_reason(
    checkpoint: str, accelerator: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 3 MiB free\nand more")
    assert resnet_vmap.main([*QUICK, "--model_path", checkpoint]) == 2
    assert capsys.readouterr().err == (
        "error: --device: cuda cannot be used: OutOfMemoryError: CUDA out of memory. Tried to"
        " allocate 20 MiB. GPU 0 has 3 MiB free\n"
    )


def test_a_probe_that_dies_is_one_line_with_the_reason(
    checkpoint: str,
    tmp_path: Path,
    accelerator: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)\n")
    assert resnet_vmap.main([*QUICK, "--model_path", checkpoint]) == 2
    assert capsys.readouterr().err == (
        "error: --device: cuda cannot be used: exited with code 7 without a result\n"
    )


def test_an_image_that_is_too_small_is_blamed_on_its_size_by_the_probe_too(
    accelerator: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = trained("squeezenet1_1", classes=10, seed=0).state_dict()
    torch.save(state, tmp_path / "squeezenet.pth")
    argv = ["--model_path", str(tmp_path / "squeezenet.pth"), "--arch", "squeezenet1_1"]
    assert resnet_vmap.main([*QUICK, *argv, "--image_size", "8"]) == 2
    message = "error: --image_size: squeezenet1_1 does not run at 8 px:"
    assert capsys.readouterr().err.startswith(message)


def test_a_probe_survives_its_way_through_json() -> None:
    limits = {
        "float32": (Limits(1e12, 2e11, 50 * 2**20), ()),
        "float16": (None, ("no roofline: out of memory",)),
    }
    sent = Probe(ENVIRONMENT, FirstForward(0.25, (torch.tensor([0.5, -1.0]),)), limits)
    found = device_probe._probe_of(json.loads(json.dumps(device_probe._plain(sent))))
    assert (found.environment, found.limits) == (ENVIRONMENT, limits)
    assert found.first_forward.seconds == 0.25
    assert found.first_forward.logits[0].tolist() == [0.5, -1.0]


class Broken(nn.Module):
    """A model whose forward raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: no kernel image is available for execution\nCompile"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_an_error_of_the_device_is_blamed_on_the_device(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of an unsupported compute capability, say, and not the size of the image."""
    monkeypatch.setattr(first_forward, "synchronize", lambda device: None)
    image = torch.zeros(1, 3, 8, 8, device="meta")
    with pytest.raises(InputError) as found:
        first_forward.run(CONFIG.models, Broken(error), image, list)
    assert found.value.argument == "device"
    assert found.value.message == f"the first forward on meta failed: {str(error).splitlines()[0]}"


def test_an_error_of_the_model_is_blamed_on_the_size_of_the_image() -> None:
    with pytest.raises(InputError, match="resnet18 does not run at 8 px: Kernel size"):
        first_forward.run(
            CONFIG.models, Broken(RuntimeError("Kernel size")), torch.zeros(1, 3, 8, 8), list
        )


def test_what_a_worker_imports_before_its_turn_initializes_no_cuda() -> None:
    """Several workers wait at a time, on one device that may be in exclusive-process mode."""
    program = (
        "import torch\n"
        "def refuse(*_): raise SystemExit('CUDA was initialized')\n"
        "torch.cuda._lazy_init = torch._C._cuda_init = refuse\n"
        "torch.cuda.is_available = lambda: True\n"
        "from ensemble.bench.executors import device_probe, worker\n"
        "from ensemble.strategies import STRATEGIES\n"
        "worker._import_for('resnet18', [*STRATEGIES], 'cuda')\n"
        "print('imported', torch.cuda.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("imported False\n"), done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_process_that_starts_workers_has_no_context_on_the_gpu(checkpoint: str) -> None:
    program = (
        "import sys, torch, resnet_vmap\n"
        "code = resnet_vmap.main(sys.argv[1:])\n"
        "print('context:', torch._C._cuda_hasPrimaryContext(0), torch.cuda.is_initialized())\n"
        "sys.exit(code)"
    )
    argv = [*QUICK, "--model_path", checkpoint, "--strategies", "loop", "vmap", "--processes", "1"]
    argv += ["--device", "cuda", "--roofline"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("context: False False\n")
