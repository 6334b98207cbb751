"""Memory readings, page faults, and the allocator settings, on real pages."""

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ensemble.errors import InputError, chained, drop_frames
from ensemble.machine import cgroups, memory
from ensemble.models.vision import torchvision

ROOT = Path(memory.__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "ten.pth"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    return str(path)


def test_a_page_fault_takes_between_10_ns_and_1_ms() -> None:
    assert 1e-8 < (memory.page_fault_seconds() or 0) < 1e-3


def touch_fresh_pages(count: int) -> None:
    """Touch pages that are fresh from the kernel, unlike pages of the heap."""
    with mmap.mmap(-1, count * mmap.PAGESIZE) as fresh:
        for offset in range(0, len(fresh), mmap.PAGESIZE):
            fresh[offset] = 1


def test_touching_fresh_pages_counts_as_page_faults() -> None:
    before = memory.page_faults() or 0
    touch_fresh_pages(10_000)
    assert (memory.page_faults() or 0) - before >= 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")
def test_the_peak_is_measured_since_the_last_reset() -> None:
    touch_fresh_pages(200_000_000 // mmap.PAGESIZE)  # freed immediately
    assert memory.reset_peak(CPU)
    start = memory.peak_bytes(CPU) or 0
    touch_fresh_pages(100_000_000 // mmap.PAGESIZE)
    assert 95_000_000 < (memory.peak_bytes(CPU) or 0) - start < 110_000_000


def test_available_memory_is_the_minimum_over_machine_process_and_cgroup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = tmp_path / "job"
    group.mkdir()
    for name, text in (
        ("memory.max", "3000"),
        ("memory.current", "1500"),
        ("memory.stat", "anon 7\ninactive_file 500\n"),
    ):
        (group / name).write_text(text)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(cgroups, "_PROC_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    assert memory.available_bytes(CPU) == 2000
    (group / "memory.max").write_text("max\n")
    assert (memory.available_bytes(CPU) or 0) > 10**6
    used = memory._status_bytes("VmSize") or 0
    limits = {resource.RLIMIT_AS: (used + 10**6, -1), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert (memory.available_bytes(CPU) or 10**9) <= 10**6


def test_out_of_memory_is_one_line_with_the_allocation_size() -> None:
    message = r"num_models: out of memory: here, tried to allocate 9,\d+,\d+ MB, .* MB available"
    with (
        pytest.raises(InputError, match=message),
        memory.out_of_memory_as_input_error("here", argument="num_models"),
    ):
        torch.empty(9 * 10**12 // 4 * 4, dtype=torch.uint8).fill_(0)
    with (
        pytest.raises(KeyError),
        memory.out_of_memory_as_input_error("here", argument="num_models"),
    ):
        raise KeyError("something else")


# As torch 2.14, cuBLAS 13, cuDNN 9 and XLA word them.
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.",
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
)
OTHER_ERRORS = (
    "CUDA error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "CUDA error: operation failed due to a previous error during capture",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
)


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_every_library_that_has_no_memory_is_recognized_by_its_message(text: str) -> None:
    assert memory.is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", OTHER_ERRORS)
def test_other_errors_are_not_out_of_memory(text: str) -> None:
    assert not memory.is_out_of_memory(RuntimeError(text))
    assert not memory.may_be_out_of_memory(RuntimeError(text))


def test_a_convolution_without_an_algorithm_may_be_out_of_memory() -> None:
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    assert memory.may_be_out_of_memory(error)
    assert not memory.is_out_of_memory(error)


def test_out_of_memory_is_found_behind_the_error_that_replaced_it() -> None:
    first, cause = torch.OutOfMemoryError("no room"), RuntimeError("invalidated")
    cause.__context__ = first
    last = RuntimeError("capture failed")
    last.__cause__ = cause
    assert memory.is_out_of_memory(last)
    assert list(chained(last)) == [last, cause, first]
    first.__context__ = last  # a cycle
    assert list(chained(last)) == [last, cause, first]
    assert not memory.is_out_of_memory(KeyError("alone"))


def test_an_error_that_hides_its_context_does_not_count_it() -> None:
    hiding = RuntimeError("other")
    hiding.__context__, hiding.__suppress_context__ = MemoryError(), True
    assert not memory.is_out_of_memory(hiding)


def test_all_frames_behind_an_error_are_dropped() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        caught = error
    assert all(one.__traceback__ is not None for one in chained(caught))
    drop_frames(caught)
    assert [one.__traceback__ for one in chained(caught)] == [None, None]


def test_a_device_whose_allocator_reports_nothing_has_unknown_available_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", refuse)
    assert memory.available_bytes(torch.device("mps")) is None
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (7, 9))
    assert memory.available_bytes(torch.device("cuda:1")) == 7


def test_unavailable_readings_are_none_and_not_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "none")
    monkeypatch.setattr(memory, "resource", None)
    assert memory.used_bytes(CPU) is None
    assert memory.peak_bytes(CPU) is None
    assert memory.page_faults() is None
    assert memory.page_fault_seconds() is None
    assert not memory.reset_peak(CPU)


@pytest.mark.slow
def test_models_and_their_stack_share_one_copy_of_the_weights(checkpoint: str) -> None:
    """N models plus their stack take at most 1.05 times the memory of the weights."""
    program = (
        "import resource, sys, torch\n"
        "from ensemble.machine import memory\n"
        "from ensemble.models import stacking, weights\n"
        "from ensemble.strategies import eager\n"
        "cpu = torch.device('cpu')\n"
        "weights.load_models([sys.argv[1]], arch='resnet18', device=cpu)\n"
        "memory.release()\n"  # freed memory may stay with the allocator
        "before = memory.used_bytes(cpu)\n"
        "models = weights.load_models([sys.argv[1]], arch='resnet18', device=cpu, num_models=16)\n"
        "state = stacking.stacked_state(models)\n"
        "eager.stateless_model(models)\n"
        "memory.release()\n"
        "print((memory.used_bytes(cpu) - before) / (16 * stacking.weight_bytes(models[0])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, checkpoint], cwd=ROOT, capture_output=True, text=True
    )
    assert 0.95 < float(done.stdout) < 1.05, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.skipif((memory.available_bytes(CPU) or 0) < 4 * 2**30, reason="needs 4 GiB of memory")
@pytest.mark.slow
def test_blocks_above_two_gibibytes_are_retained() -> None:
    program = (
        "import ctypes\n"
        "from ensemble.machine import memory\n"
        "c = ctypes.CDLL(None)\n"
        "c.malloc.restype, size = ctypes.c_void_p, ctypes.c_size_t(2**31 + 2**28)\n"
        "def fill():\n"
        "    before, block = memory.page_faults(), ctypes.c_void_p(c.malloc(size))\n"
        "    c.memset(block, 1, size)\n"
        "    c.free(block)\n"
        "    print(memory.page_faults() - before)\n"
        "assert memory.retain_freed_memory() is None\n"
        "fill()\n"
        "fill()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    first, second = map(int, done.stdout.split())
    assert first > 100
    assert second < 0.01 * first, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_retained_memory_causes_no_further_page_faults() -> None:
    program = (
        "import gc; gc.disable()\n"
        "import sys, torch\n"
        "from ensemble.machine import memory\n"
        "if sys.argv[1] == 'retain': assert memory.retain_freed_memory() is None\n"
        "for _ in range(9): torch.ones(50_000_000)\n"
        "before = memory.page_faults()\n"
        "torch.ones(50_000_000)\n"
        "print(memory.page_faults() - before)"
    )
    faults = {
        allocator: int(
            subprocess.run(
                [sys.executable, "-c", program, allocator], cwd=ROOT, capture_output=True
            ).stdout
        )
        for allocator in ("system", "retain")
    }
    pages = 200_000_000 // resource.getpagesize()
    assert faults["system"] > 0.5 * pages
    assert faults["retain"] < 0.01 * pages


def test_reserved_memory_is_that_of_the_caching_allocator_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {cuda: 20}[device])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: {cuda: 90}[device])
    assert (memory.reserved_bytes(cuda), memory.peak_reserved_bytes(cuda)) == (20, 90)
    cpu = torch.device("cpu")
    assert (memory.reserved_bytes(cpu), memory.peak_reserved_bytes(cpu)) == (None, None)
    assert memory.increase(20, 90, 5) == 75
    assert memory.increase(None, 90, 5) is None
    assert memory.increase(20, None, 5) is None
