"""Fixtures that several test modules share, each built once a session."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

gc.disable()  # until all is imported: a third of that time

# Without a GPU, Triton's interpreter runs the CUDA kernels. It is chosen when Triton is imported.
if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # these have the cores between them; their parent no torch
    import torch

    torch.set_num_threads(1)


ROOT = Path(__file__).parent.parent
# Tests that call the kernels, which are compiled once, in half a minute: by a process beside those
# of the tests, which run the others first.
LATE = ("compiler", "strategies", "bench/executors", "bench/load", "test_concurrency")
COMPILE = "from ensemble.compiler import kernels; kernels.load()"
NEEDS_CUDA = "needs a CUDA device"  # the reason that tests for a GPU are skipped with
compiling: list[subprocess.Popen[bytes]] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """In the parent of several test processes: begin to compile what is not compiled yet."""
    if session.config.getoption("numprocesses", None) and not are_compiled():
        compiling.append(subprocess.Popen([sys.executable, "-c", COMPILE], cwd=ROOT))


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    for process in compiling:
        process.kill()
        process.wait()


def are_compiled() -> bool:
    """Is there a file of compiled kernels that is younger than all that they come from?"""
    folder = ROOT / "ensemble" / "compiler"
    compiled = [
        path.stat().st_mtime for path in folder.glob("runtime/__pycache__/entry_points.run*.nbi")
    ]
    sources = [path.stat().st_mtime for path in folder.rglob("*.py")]
    return bool(compiled) and max(compiled) > max(sources)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that call the kernels come last. Tests that need a GPU are marked so."""
    for item in items:
        if any(mark.kwargs.get("reason") == NEEDS_CUDA for mark in item.iter_markers("skipif")):
            item.add_marker("cuda")
    late = tuple(str(ROOT / "tests" / name) for name in LATE)
    items.sort(key=lambda item: str(item.path).startswith(late))


def pytest_collection_finish() -> None:
    """Rows collect garbage before they begin: what was imported is none, and takes 0.2 s each."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        importlib.import_module("torch._dynamo")  # which most of them come to later
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def without_an_accelerator() -> Iterator[pytest.MonkeyPatch]:
    """Also where there is one, `--device auto` is the CPU, in this process and in those that tests
    start: they compare with what a CPU computes, and with what it cannot do."""
    with pytest.MonkeyPatch.context() as patch:
        hide_accelerators(patch)
        yield patch


@pytest.fixture(autouse=True)
def with_the_accelerator_where_it_is_needed(
    request: pytest.FixtureRequest, without_an_accelerator: pytest.MonkeyPatch
) -> Iterator[None]:
    """Tests that use a CUDA device where there is one have it."""
    if request.node.get_closest_marker("cuda"):
        without_an_accelerator.undo()
        yield
        hide_accelerators(without_an_accelerator)
    else:
        yield


def hide_accelerators(patch: pytest.MonkeyPatch) -> None:
    """Until it is undone, there is none."""
    import torch

    if torch.accelerator.is_available():
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    patch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="module")
def what_earlier_modules_left() -> None:
    """Nor is that searched for garbage."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that no test looks at need no quiet before each call, nor many of them; a third of the
    suite's time."""
    from ensemble.machine import timing
    from ensemble.strategies import autotune

    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(autotune, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(autotune, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(autotune, "release", lambda: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one CPU thread: small models are slow where many threads meet a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kitten() -> Path:
    return ROOT / "kitten.jpg"


@pytest.fixture(scope="session")
def small_model() -> nn.Module:
    """A small torchvision model with 10 classes; tests read it and leave it as it is."""
    from tests.checkpoints import SMALL, trained

    return trained(SMALL, classes=10, seed=7)


@pytest.fixture
def small_state(small_model: nn.Module) -> dict[str, Tensor]:
    """Its state dict; a new dict for each test, with shared tensors."""
    return dict(small_model.state_dict())


@pytest.fixture(scope="session")
def five_resnets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, nn.Module]]:
    """Five different ResNet-18 with 10 classes: the file of each and the model that is in it."""
    import torch

    from tests.checkpoints import trained

    folder = tmp_path_factory.mktemp("resnets")
    models = {
        folder / f"resnet{seed}.pth": trained("resnet18", classes=10, seed=seed)
        for seed in range(5)
    }
    for path, model in models.items():
        torch.save(model.state_dict(), path)
    yield models
    shutil.rmtree(folder)  # 225 MB
