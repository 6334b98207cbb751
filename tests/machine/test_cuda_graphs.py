"""CUDA graphs: whose memory a graph reads, what a failed capture leaves, and how calls take turns.

Without a GPU a fake CUDA notes what is asked of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble.machine import cuda_graphs
from ensemble.machine.memory import is_out_of_memory

CUDA = torch.device("cuda:0")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(eq=False)
class FakeStream:
    name: str
    log: list[str]

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for {event.of}")


@dataclass(eq=False)
class FakeEvent:
    of: str = "nothing"

    def record(self, stream: FakeStream) -> None:
        stream.log.append(f"{stream.name} records")
        self.of = stream.name


@dataclass
class FakeCuda:
    """Streams, pools and captures, as `torch.cuda` has them."""

    log: list[str] = field(default_factory=list)
    streams: int = 0
    pools: int = 0
    current: FakeStream | None = None
    fails_to_end: Exception | None = None

    def new_stream(self, device: object = None) -> FakeStream:
        self.streams += 1
        return FakeStream(f"stream {self.streams}", self.log)

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(
        self, graph: object, *, pool: tuple[int, int], stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        """As torch's: where the capture cannot be ended, its stream stays the current one."""
        before, self.current = self.current, stream
        self.log.append(f"begin on {stream.name}, pool {pool[1]}, {capture_error_mode}")
        try:
            yield
        finally:
            if self.fails_to_end is not None:
                raise self.fails_to_end
            self.log.append("end")
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.current = FakeStream("the caller's", fake.log)
    for name, function in {
        "CUDAGraph": object,
        "graph_pool_handle": fake.pool,
        "Stream": fake.new_stream,
        "Event": FakeEvent,
        "stream": fake.on,
        "current_stream": lambda device: fake.current,
        "synchronize": lambda device: fake.log.append("synchronize"),
        "graph": fake.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    calls = {
        "_cuda_clearCublasWorkspaces": lambda: fake.log.append("clear workspaces"),
        "_cuda_endAllocateToPool": lambda device, pool: fake.log.append(f"end pool {pool[1]}"),
        "_cuda_releasePool": lambda device, pool: fake.log.append(f"release pool {pool[1]}"),
    }
    for name, function in calls.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    return fake


def test_each_graph_has_its_own_stream_and_pool_and_workspaces_in_it(cuda: FakeCuda) -> None:
    for index in (1, 2):
        cuda.log.clear()
        _, result = cuda_graphs.capture(lambda: cuda.log.append("run"), CUDA, warmup=2)
        assert result is None
        assert cuda.log == [
            *("synchronize", "run", "run"),
            *("clear workspaces", f"begin on stream {index}, pool {index}, thread_local"),
            *("run", "end", "clear workspaces"),
        ]


def test_the_warmup_runs_on_the_stream_of_the_capture(cuda: FakeCuda) -> None:
    seen = list[Any]()
    cuda_graphs.capture(lambda: seen.append(cuda.current), CUDA, warmup=1)
    assert [stream.name for stream in seen] == ["stream 1", "stream 1"]


def test_a_failed_capture_raises_the_first_error_and_restores_the_stream(cuda: FakeCuda) -> None:
    """The caller's stream is current again, the allocator no longer records, and the cuBLAS
    workspaces are not those of the lost pool."""
    calls = iter([None, torch.OutOfMemoryError("CUDA out of memory")])
    cuda.fails_to_end = RuntimeError("operation failed due to a previous error during capture")

    def record() -> None:
        error = next(calls)
        if error is not None:
            raise error

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        cuda_graphs.capture(record, CUDA, warmup=1)
    assert cuda.current is not None
    assert cuda.current.name == "the caller's"
    assert cuda.log[-3:] == ["clear workspaces", "end pool 1", "release pool 1"]


def test_what_was_behind_the_error_of_a_failed_capture_is_still_known(cuda: FakeCuda) -> None:
    def record() -> None:
        try:
            raise torch.OutOfMemoryError("no room")
        except torch.OutOfMemoryError:
            raise RuntimeError("cuDNN failed")  # noqa: B904

    cuda.fails_to_end = RuntimeError("invalidated")
    with pytest.raises(RuntimeError, match="cuDNN failed") as caught:
        cuda_graphs.capture(record, CUDA, warmup=0)
    assert is_out_of_memory(caught.value)


def test_a_graph_that_cannot_be_instantiated_raises_that_error(cuda: FakeCuda) -> None:
    cuda.fails_to_end = RuntimeError("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="CUDA error: out of memory") as caught:
        cuda_graphs.capture(lambda: None, CUDA, warmup=0)
    assert is_out_of_memory(caught.value)
    assert cuda.current is not None
    assert cuda.current.name == "the caller's"


def test_a_pool_whose_capture_has_ended_is_left_to_its_graph(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_recording(device: int, pool: tuple[int, int]) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", not_recording)
    with pytest.raises(KeyError):
        cuda_graphs.capture(lambda: {}[0], CUDA, warmup=0)  # type: ignore[index]
    assert "release pool 1" not in cuda.log


def test_a_call_waits_until_the_call_before_has_copied_its_result(cuda: FakeCuda) -> None:
    @dataclass
    class Graph:
        x: Tensor
        result: Tensor

        def replay(self) -> None:
            assert cuda.current is not None
            cuda.log.append(f"{cuda.current.name} replays")
            self.result.copy_(2 * self.x)

    x, result = torch.zeros(2), torch.zeros(2)
    graph: Any = Graph(x, result)
    copied: Any = FakeEvent()
    call = cuda_graphs.GraphedFunction(graph, x, result, copied, None)
    first = call(torch.ones(2))
    other = cuda.new_stream()
    with cuda.on(other):
        second = call(torch.full((2,), 3.0))
    assert cuda.log == [
        *("the caller's waits for nothing", "the caller's replays", "the caller's records"),
        *("stream 1 waits for the caller's", "stream 1 replays", "stream 1 records"),
    ]
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [6.0, 6.0])


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(1024, 1024, device="cuda", generator=generator) / 32 for _ in range(4)]


def product_graph(factors: list[Tensor]) -> cuda_graphs.GraphedFunction:
    """A chain of matrix products, which need a cuBLAS workspace, as a CUDA graph."""

    def function(x: Tensor) -> Tensor:
        for factor in factors:
            x = x @ factor
        return x

    example = torch.zeros(8, 1024, device="cuda")
    return cuda_graphs.graphed(function, example, warmup=3)


@NEEDS_CUDA
@pytest.mark.parametrize("others", [1, 40])  # torch hands out 32 streams in turn
def test_dropping_a_graph_frees_nothing_that_another_reads(others: int) -> None:
    kept_factors, x = matrices(0), torch.randn(8, 1024, device="cuda")
    dropped = [product_graph(matrices(1)) for _ in range(others)]
    kept = product_graph(kept_factors)
    dropped += [product_graph(matrices(2)) for _ in range(others)]
    expected = kept(x)
    torch.cuda.synchronize()
    del dropped
    torch.cuda.empty_cache()
    free = int(torch.cuda.mem_get_info()[0] * 0.9)
    overwritten = torch.full((free // 4,), float("nan"), device="cuda")
    for _ in range(3):
        assert torch.equal(kept(x), expected)
    torch.cuda.synchronize()
    assert bool(overwritten.isnan().all())


@NEEDS_CUDA
def test_calls_from_threads_on_streams_of_their_own_get_their_own_results() -> None:
    from ensemble.strategies.build_result import serialized

    factors = matrices(0)
    call = serialized(product_graph(factors))
    generator = torch.Generator("cuda").manual_seed(3)
    inputs = [torch.randn(8, 1024, device="cuda", generator=generator) for _ in range(200)]
    expected = [call(x) for x in inputs]
    torch.cuda.synchronize()

    def work(part: list[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [call(x) for x in part]
            torch.cuda.current_stream().synchronize()
            return results

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, [inputs[start::4] for start in range(4)]))
    for start, results in enumerate(found):
        for one, right in zip(results, expected[start::4], strict=True):
            assert torch.equal(one, right)


@NEEDS_CUDA
def test_after_a_failed_capture_the_device_is_usable_and_memory_is_returned() -> None:
    def greedy() -> Tensor:
        return torch.empty(2**50, dtype=torch.uint8, device="cuda")

    before = torch.cuda.current_stream()
    with pytest.raises(Exception, match="out of memory") as caught:
        cuda_graphs.capture(greedy, CUDA, warmup=0)
    assert is_out_of_memory(caught.value)
    assert torch.cuda.current_stream() == before
    assert not torch.cuda.is_current_stream_capturing()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del held
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    graph = product_graph(matrices(0))
    assert bool(graph(torch.ones(8, 1024, device="cuda")).isfinite().all())
    assert reserved < 2**28
