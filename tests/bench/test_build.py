"""What a strategy's start costs: its own build and first call, and not what is done once."""

import time

import pytest
import torch

from ensemble.bench.build import build
from ensemble.compiler import kernels
from tests.tiny import tiny_models


def test_compiling_the_kernels_is_in_no_strategys_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[float] = []

    def load() -> None:
        if not compiled:
            begin = time.perf_counter()
            time.sleep(0.5)
            compiled.append(time.perf_counter() - begin)

    kernels.load()
    monkeypatch.setattr(kernels, "load", load)
    begin = time.perf_counter()
    started = build("lowered_vmap", tiny_models(2), torch.randn(1, 3, 8, 8), torch.float32)
    took = time.perf_counter() - begin
    assert compiled
    assert started.build_s + started.first_call_s < took - compiled[0]
