"""Made-up records that tests of reports, statistics and the measuring loop begin with."""

from dataclasses import replace
from typing import Any

from ensemble.bench.case import Case
from ensemble.bench.cli import parse
from ensemble.bench.config import Config, config_of
from ensemble.bench.environment import Environment
from ensemble.bench.measurement import UNAVAILABLE as UNAVAILABLE_STATUS
from ensemble.bench.measurement import Measurement, Note
from ensemble.bench.summary import Summary

CASE = Case("vmap", 4, 1, 224, "float32", "shared")
ONE = Measurement(
    CASE,
    times_s=(1.0, 2.0, 4.0),
    reference_times_s=(2.0, 3.0, 2.0),
    build_s=0.1,
    first_call_s=0.2,
    top1=[[281]] * 4,
    notes=(Note("a note"),),
)
ROW = Summary(CASE, (ONE,))
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


def with_options(config: Config, **changes: Any) -> Config:
    """The configuration with other options, by their names."""
    return config_of(config.plain() | changes)


CONFIG: Config = with_options(
    parse([]), num_models=(4,), image_path="kitten.jpg", strategies=("loop", "vmap")
)

_OF_CASE = set(Case.__dataclass_fields__)


def changed(row: Summary, **changes: Any) -> Summary:
    """The row with other fields of its case, or of every measurement of it."""
    case = {name: value for name, value in changes.items() if name in _OF_CASE}
    rest = {name: value for name, value in changes.items() if name not in case}
    if "notes" in rest:
        rest["notes"] = tuple(map(Note, rest["notes"]))
    new_case = replace(row.case, **case)
    measurements = (replace(one, case=new_case, **rest) for one in row.measurements)
    return replace(row, case=new_case, measurements=tuple(measurements))


def row_of(*measurements: Measurement) -> Summary:
    """The row of these measurements."""
    return Summary(measurements[0].case, measurements)


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
UNAVAILABLE = row_of(
    Measurement(replace(CASE, strategy="cudagraph_loop"), UNAVAILABLE_STATUS, "no CUDA")
)


def at(num_models: int, speedup: float, **changes: Any) -> Summary:
    """A row of `vmap` that is so many times as fast as the loop."""
    return changed(VMAP, num_models=num_models, times_s=(0.1 / speedup,) * 20, **changes)


def curve(*speedups: float) -> list[Summary]:
    """Rows of N = 1, 2, 4, ..."""
    return [at(2**index, speedup) for index, speedup in enumerate(speedups)]
