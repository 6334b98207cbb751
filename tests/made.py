"""Made-up records that tests of reports, statistics and the measuring loop begin with."""

from dataclasses import replace
from typing import Any

from ensemble.bench.cli import parse
from ensemble.bench.config import Config
from ensemble.bench.records import (
    Case,
    Environment,
    Process,
    Result,
)

CASE = Case("vmap", 4, 1, 224, "float32", "shared")
PROCESS = Process((1.0, 2.0, 4.0), (2.0, 3.0, 2.0), build_s=0.1, first_call_s=0.2)
ROW = Result(CASE, processes=(PROCESS,), top1=[[281]] * 4, notes=("a note",))
ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00+00:00",
    argv=("resnet_vmap.py",),
    git_commit=None,
    platform="Linux",
    python="3.11",
    torch="2.14.1",
    torchvision="0.29.1",
    device="cpu",
    device_name=None,
    cpu_capability="AVX512",
    cores=2,
    threads=2,
    tf32=False,
    cudnn_benchmark=False,
    allocator="system",
    page_fault_s=1e-6,
    weights="random",
    first_forward_s=0.25,
)
CONFIG: Config = replace(
    parse([]), num_models=(4,), image_path="kitten.jpg", strategies=("loop", "vmap")
)

_OF_CASE = set(Case.__dataclass_fields__)
_OF_PROCESS = set(Process.__dataclass_fields__)


def changed(row: Result, **changes: Any) -> Result:
    """The row, measured in one process, with other fields of its own, its case or its process."""
    case = {name: value for name, value in changes.items() if name in _OF_CASE}
    process = {name: value for name, value in changes.items() if name in _OF_PROCESS}
    rest = {name: value for name, value in changes.items() if name not in {*case, *process}}
    processes = tuple(replace(one, **process) for one in row.processes)
    return replace(row, case=replace(row.case, **case), processes=processes, **rest)


LOOP = changed(
    ROW, strategy="loop", times_s=(0.1,) * 20, reference_times_s=(), notes=(), first_call_s=0.3
)
VMAP = changed(
    ROW,
    times_s=(0.05,) * 20,
    reference_times_s=(0.1,) * 20,
    notes=(),
    first_call_s=0.02,
    max_rel_error=2e-7,
    top1_agreement=1.0,
    peak_memory_bytes=196_000_000,
    page_faults_per_call=12_000.0,
    reference_page_faults_per_call=0.0,
)
UNAVAILABLE = Result(
    replace(CASE, strategy="cudagraph_loop"), status="unavailable", error="no CUDA"
)


def at(num_models: int, speedup: float, **changes: Any) -> Result:
    """A row of `vmap` that is so many times as fast as the loop."""
    return changed(VMAP, num_models=num_models, times_s=(0.1 / speedup,) * 20, **changes)


def curve(*speedups: float) -> list[Result]:
    """Rows of N = 1, 2, 4, ..."""
    return [at(2**index, speedup) for index, speedup in enumerate(speedups)]
