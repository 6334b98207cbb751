"""What only a GPU shows of a measurement: events, copies, TF32, a flushed L2, reserved memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ensemble.bench.case import Task
from ensemble.bench.executors.in_process import setup_of
from ensemble.bench.load import engine_builder
from ensemble.bench.measure import measure
from ensemble.bench.measurement import Measurement
from ensemble.bench.setup import local_setup
from ensemble.bench.workload import Workload
from ensemble.machine import devices
from ensemble.machine.precision import Float32Precision, current_float32_precision
from ensemble.models import weights
from ensemble.statistics import median
from tests.made import CASE, CONFIG, with_options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")


def measured(strategy: str, dtype: str = "float32", *, flush_l2: bool = False) -> Measurement:
    """A row of two ResNet-18 at 64 px."""
    devices.configure(threads=None)
    case = replace(CASE, strategy=strategy, num_models=2, image_size=64, dtype=dtype)
    models = weights.random_models(2, arch="resnet18", device=CUDA, seed=0)
    images = torch.randn(1, 3, 64, 64, device="cpu").to(CUDA)
    config = with_options(CONFIG, min_pairs=8, min_seconds=0.0, flush_l2=flush_l2, processes=0)
    setup = setup_of(config, Workload(CUDA, models, "random", lambda px: images), [case])
    return measure(
        Task(case), setup, config.measure, reduce="none", on_stage=lambda stage, done: None
    )


def test_a_row_has_times_by_events_with_copies_and_its_reserved_memory() -> None:
    row = measured("cudagraph_loop")
    assert (row.status, row.error) == ("ok", None)
    assert len(row.device_times_s) == len(row.times_s) == 8
    assert len(row.reference_device_times_s) == 8
    wall, device = median(row.times_s) or 0.0, median(row.device_times_s) or 0.0
    assert 0.1 * wall < device < 1.1 * wall
    assert (row.with_copies_s or 0.0) > device
    assert (row.peak_reserved_bytes or 0) >= 0.5 * (row.peak_memory_bytes or 1)


def test_a_row_in_tf32_differs_from_float32_and_the_next_row_does_not() -> None:
    exact, fast = measured("folded_loop"), measured("folded_loop", "tf32")
    assert current_float32_precision() is Float32Precision.IEEE
    again = measured("folded_loop")
    assert [row.status for row in (exact, fast, again)] == ["ok"] * 3
    assert max(exact.max_rel_error or 1.0, again.max_rel_error or 1.0) < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < (fast.max_rel_error or 0.0) < 1e-3


def test_a_flushed_cache_makes_a_short_call_slower() -> None:
    warm, cold = measured("cudagraph_loop"), measured("cudagraph_loop", flush_l2=True)
    assert cold.status == "ok"
    assert (median(cold.device_times_s) or 0.0) > 0.95 * (median(warm.device_times_s) or 1.0)


def test_under_load_images_lie_in_pinned_host_memory() -> None:
    devices.configure(threads=None)
    case = replace(CASE, strategy="vmap", num_models=2, image_size=64)
    models = weights.random_models(2, arch="resnet18", device=CUDA, seed=0)
    images = torch.randn(4, 3, 64, 64, device="cpu").to(CUDA)
    setup = local_setup([case], models, lambda px: images)
    engine = engine_builder.build_engine(case, setup, max_batch=2, on_stage=lambda *_: None)
    assert all(image.is_pinned() for image in engine._images)
    assert engine.device.type == "cuda"
