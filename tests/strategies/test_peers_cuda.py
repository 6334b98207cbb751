"""Other runtimes on CUDA: their options, the order of their streams, and their weights.

Without a GPU, fake packages and fake streams record what they are given, and CPU memory stands in
for that of a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemble
from ensemble import strategies
from ensemble.compiler.graph.batch_norm_folding import folded
from ensemble.errors import UnavailableError
from ensemble.machine.precision import Float32Precision, float32_precision
from ensemble.models.vision import torchvision
from ensemble.strategies import (
    peer_conversion,
    peer_jax,
    peer_onnxruntime,
    peer_streams,
    peer_tensorrt,
    peers,
)
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.stacked_outputs import stack_outputs
from tests.tiny import independent, tiny_models

CUDA = torch.device("cuda:1")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
QUIET = pytest.mark.filterwarnings("ignore")  # of third-party packages


@dataclass
class Device:
    """A device that executes at once; it records waits, launches and captures, in order."""

    log: list[str] = field(default_factory=list)
    current: str = "caller"
    streams: int = 0
    events: int = 0

    def stream(self, _: object = None) -> Any:
        self.streams += 1
        return self.named(f"stream{self.streams - 1}")

    def named(self, name: str) -> Any:
        handle = 100 + int(name.removeprefix("stream")) if name != "caller" else 0
        return SimpleNamespace(
            name=name,
            cuda_stream=handle,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for {event.name}"),
        )

    def event(self) -> Any:
        self.events += 1
        name = f"event{self.events - 1}"
        record = lambda stream: self.log.append(f"{stream.name} records {name}")  # noqa: E731
        return SimpleNamespace(name=name, record=record)

    @contextlib.contextmanager
    def capture(
        self, graph: Any, pool: Any, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream.name
        begin = len(self.log)
        yield
        self.current = before
        graph.replay = lambda: self.log.append("replay")
        self.log[begin:] = [f"captured: {line}" for line in self.log[begin:]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: fake.named(fake.current))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return fake


def add_index(device: Device) -> peer_streams.Bind:
    """Models whose logits are the first pixel plus their index."""

    def bind(index: int, x: Tensor, logits: Tensor, stream: Any) -> Callable[[], None]:
        def enqueue() -> None:
            device.log.append(f"model {index} on {stream.name}")
            logits.copy_(x[:, 0, 0, :1] + index)

        return enqueue

    return bind


def test_calls_wait_for_the_current_stream_and_for_the_copies_of_the_call_before(
    device: Device,
) -> None:
    example, output = torch.zeros(1, 3, 2, 2), torch.zeros(1, 1)
    run = peer_streams.on_streams(add_index(device), example, output, 3, max_streams=2)
    first = run([torch.full_like(example, 10)] * 3)
    second = run([torch.full_like(example, 20)] * 3)
    call = [
        "caller waits for event0",
        *("stream0 waits for caller", "stream1 waits for caller"),
        *("model 0 on stream0", "model 1 on stream1", "model 2 on stream0"),
        *("caller waits for stream0", "caller waits for stream1"),
        "caller records event0",
    ]
    assert device.log == call * 2
    assert [float(logits) for logits in first] == [10, 11, 12]  # not overwritten by the second
    assert [float(logits) for logits in second] == [20, 21, 22]


def test_a_batch_for_each_model_lies_in_aligned_memory_of_its_own(device: Device) -> None:
    inputs: list[Tensor] = []

    def bind(index: int, x: Tensor, logits: Tensor, stream: Any) -> Callable[[], None]:
        inputs.append(x)

        def enqueue() -> None:
            logits.copy_(x[:, 0, 0, :1])

        return enqueue

    example = torch.arange(18.0).view(2, 1, 3, 1, 3).movedim(-1, 2).contiguous().movedim(2, -1)
    output = torch.zeros(1, 1)
    run = peer_streams.on_streams(bind, example, output, 2, max_streams=1)
    assert [float(logits) for logits in run(list(example))] == [0, 9]
    assert all(x.is_contiguous() and x.storage_offset() == 0 for x in inputs)
    assert torch.equal(torch.stack(inputs), example)


def test_launches_are_captured_after_a_first_call_and_replayed(device: Device) -> None:
    example, output = torch.zeros(1, 3, 2, 2), torch.zeros(1, 1)
    run = peer_streams.on_streams(
        add_index(device), example, output, 1, max_streams=1, capture=True
    )
    launch = ["stream0 waits for {0}", "model 0 on stream0", "{0} waits for stream0"]
    assert device.log == [
        *(line.format("caller") for line in launch),
        *(f"captured: {line.format('stream1')}" for line in launch),
    ]
    device.log.clear()
    run([example])
    assert device.log == ["caller waits for event0", "replay", "caller records event0"]


@pytest.mark.usefixtures("device")
def test_a_runtime_that_fails_on_cuda_is_unavailable_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(models: object, example: object) -> None:
        raise RuntimeError("libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(peer_tensorrt, "build", build)
    example: Any = SimpleNamespace(device=CUDA, dtype=torch.float32)
    why = "tensorrt cannot run these models on cuda:1: RuntimeError: libcublasLt.so.13"
    with pytest.raises(UnavailableError, match=why):
        peers.tensorrt(tiny_models(1), example)


@pytest.mark.usefixtures("device")
def test_a_row_on_cuda_says_that_its_memory_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    built = BuildResult(lambda x: x, "setting: streams")
    monkeypatch.setattr(peer_tensorrt, "build", lambda models, example: built)
    example: Any = SimpleNamespace(device=CUDA, dtype=torch.float32)
    note = peers.tensorrt(tiny_models(1), example).note
    assert note == "setting: streams; memory: without that of tensorrt's own allocator"


def test_a_missing_runtime_on_cuda_is_reported_with_the_requirements_for_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr(peer_conversion, "import_module", missing)
    advice = "tensorrt is not installed: pip install -r requirements-peers-cuda.txt"
    with pytest.raises(UnavailableError, match=advice):
        peer_conversion.require("tensorrt", CUDA)


# ONNX


@QUIET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_onnx_graph_is_valid_and_holds_each_weight_of_its_model_once(
    dtype: torch.dtype,
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    models = [model.to(dtype) for model in tiny_models(2)]
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    with torch.inference_mode():
        copies = folded(models, x)
        graphs = peer_conversion.to_onnx(copies, x)
    for copy, graph in zip(copies, graphs, strict=True):
        proto = onnx.load_from_string(graph)
        onnx.checker.check_model(proto, full_check=True)
        weights = dict(copy.named_parameters())
        found = {each.name: bytes(each.raw_data) for each in proto.graph.initializer}
        assert sum(map(len, found.values())) <= sum(t.nbytes for t in weights.values()) + 64
        for name, weight in weights.items():
            assert found[name] == weight.contiguous().view(torch.uint8).numpy().tobytes()


@QUIET
def test_the_onnx_graph_of_a_resnet_has_no_layer_that_the_model_does_not_have() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    models, x = resnets(1), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        (graph,) = peer_conversion.to_onnx(folded(models, x), x)
    kinds = {node.op_type for node in onnx.load_from_string(graph).graph.node}
    shapes = {"Constant", "Concat", "Reshape"}
    assert kinds - shapes == {"Conv", "Relu", "MaxPool", "Add", "ReduceMean", "Gemm"}


# ONNX Runtime


class Package:
    """A fake onnxruntime that records what its sessions get."""

    def __init__(self, providers: tuple[str, ...] = ("CUDAExecutionProvider",)) -> None:
        self.providers, self.given = providers, list[Any]()
        self.config: dict[str, str] = {}
        self.run_config: dict[str, str] = {}

    def get_available_providers(self) -> list[str]:
        return list(self.providers)

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_session_config_entry=self.config.__setitem__)

    def RunOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(add_run_config_entry=self.run_config.__setitem__)

    def InferenceSession(self, graph: bytes, options: Any, providers: Any) -> Any:  # noqa: N802
        self.given.append((graph, *providers))
        named = [SimpleNamespace(name="x")], [SimpleNamespace(name="logits")]
        binding = SimpleNamespace(
            bind_input=lambda *args: self.given.append(("input", *args)),
            bind_output=lambda *args: self.given.append(("output", *args)),
        )
        return SimpleNamespace(
            get_inputs=lambda: named[0],
            get_outputs=lambda: named[1],
            io_binding=lambda: binding,
            run_with_iobinding=lambda *args: self.given.append("run"),
        )


@pytest.mark.parametrize("tf32", [False, True])
def test_the_cuda_provider_gets_torchs_stream_and_tf32_only_if_it_is_allowed(tf32: bool) -> None:
    stream = SimpleNamespace(cuda_stream=7)
    given = peer_onnxruntime.provider_options(stream, CUDA, nhwc=True, graph=False, tf32=tf32)
    assert given == {
        "device_id": "1",
        "user_compute_stream": "7",
        "use_tf32": "1" if tf32 else "0",
        "prefer_nhwc": "1",
        "enable_cuda_graph": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",
    }


def test_every_layout_and_launch_of_the_cuda_provider_is_a_setting(device: Device) -> None:
    package, example = Package(), torch.zeros(1, 3, 2, 2)
    settings = peer_onnxruntime.cuda_settings(package, [b"a", b"b"], example, torch.zeros(1, 5))
    found = {}
    with float32_precision(Float32Precision.IEEE):
        for name, make in settings.items():
            package.given.clear()
            make(2)([example] * 2)
            sessions = [each for each in package.given if each[0] in (b"a", b"b")]
            options = [options for _, (_, options) in sessions]
            assert [graph for graph, _ in sessions] == [b"a", b"b"]
            assert package.given.count("run") == 2
            assert {each["use_tf32"] for each in options} == {"0"}
            (layout,) = {each["prefer_nhwc"] for each in options}
            (graph,) = {each["enable_cuda_graph"] for each in options}
            found[name] = layout, graph, len({each["user_compute_stream"] for each in options})
    assert found == {
        "NCHW, sequential": ("0", "0", 1),
        "NCHW, CUDA graphs": ("0", "1", 1),
        "NCHW, streams": ("0", "0", 2),
        "NHWC, sequential": ("1", "0", 1),
        "NHWC, CUDA graphs": ("1", "1", 1),
        "NHWC, streams": ("1", "0", 2),
    }
    assert package.config == {"session.disable_cpu_ep_fallback": "1"}
    assert package.run_config == {"disable_synchronize_execution_providers": "1"}


def test_a_build_without_a_cuda_provider_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_only = Package(("CPUExecutionProvider",))
    monkeypatch.setattr(peer_conversion, "require", lambda name, device: cpu_only)
    example: Any = SimpleNamespace(device=CUDA, dtype=torch.float32)
    advice = "pip install -r requirements-peers-cuda.txt"
    with pytest.raises(UnavailableError, match=f"no CUDA provider in this build of.*: {advice}"):
        peer_onnxruntime.build(tiny_models(1), example)


@QUIET
def test_a_bound_session_reads_and_writes_the_memory_of_tensors() -> None:
    package = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    models, x = tiny_models(1), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        (graph,) = peer_conversion.to_onnx(folded(models, x), x)
    session = package.InferenceSession(graph, providers=["CPUExecutionProvider"])
    expected, memory = independent(models, x)[0], torch.zeros_like(x)
    logits = torch.zeros_like(expected)
    run = peer_onnxruntime.bound(package, session, memory, logits)
    memory.copy_(x)
    run()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# TensorRT


class TensorRT:
    """A fake tensorrt that records its flags; its engines read and write the given addresses."""

    Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

    def __init__(self, *, parses: bool = True, builds: bool = True) -> None:
        self.parses, self.builds = parses, builds
        self.flags, self.caches = list[tuple[str, str]](), list[object]()
        self.network_flags: set[int] = set()

    def Builder(self, logger: object) -> Any:  # noqa: N802
        def create_network(flags: int) -> Any:
            self.network_flags.add(flags)
            return SimpleNamespace(graph=b"")

        def config() -> Any:
            return SimpleNamespace(
                create_timing_cache=lambda buffer: SimpleNamespace(buffer=buffer),
                set_timing_cache=lambda cache, ignore_mismatch: self.caches.append(cache),
                set_flag=lambda flag: self.flags.append(("set", flag)),
                clear_flag=lambda flag: self.flags.append(("clear", flag)),
            )

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=config,
            build_serialized_network=lambda network, _: network.graph if self.builds else None,
        )

    def OnnxParser(self, network: Any, logger: object) -> Any:  # noqa: N802
        def parse(graph: bytes) -> bool:
            network.graph = graph
            return self.parses

        error = SimpleNamespace(desc=lambda: "no such operator")
        return SimpleNamespace(parse=parse, get_error=lambda index: error)

    def Runtime(self, logger: object) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=Engine)


class Engine:
    """An engine that computes on the CPU, by ONNX Runtime."""

    num_io_tensors = 2

    def __init__(self, plan: bytes) -> None:
        self.plan = plan

    def get_tensor_name(self, index: int) -> str:
        return ("x", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "input", "logits": "output"}[name]

    def create_execution_context(self) -> Any:
        package = pytest.importorskip("onnxruntime")
        session = package.InferenceSession(self.plan, providers=["CPUExecutionProvider"])
        addresses: dict[str, int] = {}

        def execute(stream: int) -> bool:
            assert stream >= 100  # not the default stream
            shape = session.get_inputs()[0].shape
            x = at(addresses["x"], torch.Size(shape))
            (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            at(addresses["logits"], torch.Size(logits.shape)).copy_(torch.from_numpy(logits))
            return True

        return SimpleNamespace(set_tensor_address=addresses.__setitem__, execute_async_v3=execute)


def at(address: int, shape: torch.Size) -> Tensor:
    """The float32 tensor at an address of this process."""
    memory = (ctypes.c_float * shape.numel()).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


@pytest.mark.parametrize(("tf32", "action"), [(False, "clear"), (True, "set")])
def test_engines_are_strongly_typed_share_a_timing_cache_and_use_tf32_only_if_allowed(
    tf32: bool, action: str
) -> None:
    package = TensorRT()
    engines = peer_tensorrt.build_engines(package, [b"a", b"b"], tf32=tf32)
    assert [engine.plan for engine in engines] == [b"a", b"b"]
    assert package.network_flags == {1 << 1}
    assert package.flags == [(action, "TF32")] * 2
    assert package.caches[0] is package.caches[1]


def test_a_graph_that_tensorrt_cannot_parse_or_build_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="cannot parse it: no such operator"):
        peer_tensorrt.build_engines(TensorRT(parses=False), [b"a"], tf32=False)
    with pytest.raises(UnavailableError, match="cannot build an engine"):
        peer_tensorrt.build_engines(TensorRT(builds=False), [b"a"], tf32=False)


def test_an_engine_that_cannot_be_queued_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(
        set_tensor_address=lambda name, address: True, execute_async_v3=lambda stream: False
    )
    engine = Engine(b"")
    monkeypatch.setattr(engine, "create_execution_context", lambda: context)
    x, stream = torch.zeros(1), SimpleNamespace(cuda_stream=100)
    enqueue = peer_tensorrt.bound(TensorRT(), engine, x, x, stream)
    with pytest.raises(RuntimeError, match="TensorRT could not queue a forward"):
        enqueue()


@QUIET
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("per_model", [False, True])
def test_every_setting_of_tensorrt_computes_the_logits_of_each_model(
    per_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    require, package = peer_conversion.require, TensorRT()
    monkeypatch.setattr(
        peer_conversion,
        "require",
        lambda name, device: package if name == "tensorrt" else require(name, device),
    )
    monkeypatch.setattr(peer_streams, "_captured", lambda launch, device: launch)
    models, x = tiny_models(3), torch.randn((3, 2, 3, 8, 8) if per_model else (2, 3, 8, 8))
    with torch.inference_mode():
        built = peer_tensorrt.build(models, x)
        for images in torch.randn(2, *x.shape):
            found = stack_outputs(built.forward(images), 3)
            torch.testing.assert_close(found, independent(models, images), rtol=1e-4, atol=1e-4)
    tried = built.details.removeprefix("tried with 3 models: ")
    for name in ("sequential", "streams", "sequential, one CUDA graph", "streams, one CUDA graph"):
        assert f"{name} " in tried
    assert ":" not in tried  # no setting failed


# JAX


@pytest.mark.parametrize(("device", "platforms"), [("cpu", "cpu"), ("cuda:0", "cuda,cpu")])
def test_jax_is_restricted_to_the_kind_of_device_before_its_import(
    device: str, platforms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None, str | None]] = []

    def importing(name: str) -> None:
        keys = ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE")
        seen.append((name, *(os.environ.get(key) for key in keys)))  # type: ignore[arg-type]
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "of the shell")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    monkeypatch.setattr(peer_conversion, "import_module", importing)
    example: Any = SimpleNamespace(device=torch.device(device))
    with pytest.raises(UnavailableError, match="jax is not installed"):
        peer_jax.build([], example)
    assert seen == [("jax", platforms, "false")]


def test_the_environment_of_an_imported_jax_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace())
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    peer_jax.set_environment(torch.device("cpu"))
    assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_a_jax_without_the_device_is_unavailable() -> None:
    def devices(platform: str) -> Any:
        if platform != "cpu":
            raise RuntimeError("Unknown backend cuda")
        return ["its CPU"]

    package = SimpleNamespace(devices=devices)
    assert peer_jax.jax_device(package, torch.device("cpu")) == "its CPU"
    with pytest.raises(UnavailableError, match="jax has no CUDA device in this process: pip"):
        peer_jax.jax_device(package, CUDA)


def test_a_device_of_jax_is_that_of_torch() -> None:
    both = [SimpleNamespace(local_hardware_id=index) for index in (1, 0)]
    package = SimpleNamespace(devices=lambda platform: both)
    assert peer_jax.jax_device(package, CUDA) is both[0]
    assert peer_jax.jax_device(package, torch.device("cuda")) is both[1]


def test_jax_multiplies_float32_numbers_in_float32_unless_tf32_is_allowed() -> None:
    lax = pytest.importorskip("jax").lax
    from ensemble.strategies import jax_resnet

    with float32_precision(Float32Precision.IEEE):
        assert jax_resnet.precision(torch.float32) is lax.Precision.HIGHEST
        assert jax_resnet.precision(torch.bfloat16) is lax.Precision.DEFAULT
    with float32_precision(Float32Precision.TF32):
        assert jax_resnet.precision(torch.float32) is lax.Precision.DEFAULT


def test_every_product_of_the_jax_resnet_has_the_given_precision() -> None:
    jax = pytest.importorskip("jax")
    from ensemble.strategies import jax_resnet

    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=7).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        (copy,) = folded([model], x)
    state = {
        name: jax_resnet._weights(t, jax.devices("cpu")[0])
        for name, t in dict(copy.named_parameters()).items()
    }
    highest = jax.lax.Precision.HIGHEST
    program = jax.make_jaxpr(lambda s, x: jax_resnet._resnet(copy, highest, s, x))(state, x.numpy())
    products = [
        equation.params["precision"]
        for equation in program.eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert len(products) == 13  # 1 + 4 x 2 convolutions, 3 of shortcuts, fc
    assert set(products) == {(highest, highest)}


def test_the_forward_of_jax_does_not_hold_the_weights_of_torch() -> None:
    """On a GPU they would be there twice."""
    jax = pytest.importorskip("jax")
    from ensemble.strategies import jax_resnet

    example = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        copies = folded(resnets(2), example)
        alive = weakref.ref(copies[0].get_parameter("layer1.0.conv1.weight"))
        settings = jax_resnet.settings(copies, example, jax.devices("cpu")[0])
        runs = [make(2) for make in settings.values()]
        del copies, settings
    assert alive() is None
    assert [len(run([example] * 2)) for run in runs] == [2, 2]


def test_arrays_are_committed_to_the_device_of_their_tensor() -> None:
    jax = pytest.importorskip("jax")
    from ensemble.strategies import jax_resnet

    array = jax_resnet.to_jax(torch.ones(2, 3), jax.devices("cpu")[0])
    assert array.committed
    assert array.devices() == {jax.devices("cpu")[0]}


def test_weights_in_layouts_that_xla_prefers_give_the_same_logits() -> None:
    jax = pytest.importorskip("jax")
    from ensemble.strategies import jax_resnet

    def product(state: dict[str, Any], x: Any) -> Any:
        return x @ state["weight"]

    states = [{"weight": jax.numpy.full((3, 2), float(index))} for index in range(2)]
    x = jax.numpy.ones((1, 3))
    run, own = jax_resnet.with_own_layouts(product, states, x)
    assert [run(state, x).tolist() for state in own] == [[[0, 0]], [[3, 3]]]


# On a device


def resnets(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    return [
        torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=7).eval() for _ in range(count)
    ]


@QUIET
@NEEDS_CUDA
@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime", "jax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_model", [False, True])
def test_a_runtime_on_cuda_computes_the_logits_of_the_loop_on_any_stream(
    name: str, dtype: torch.dtype, per_model: bool
) -> None:
    models = [model.cuda().to(dtype) for model in resnets(3)]
    shape = (3, 2, 3, 64, 64) if per_model else (2, 3, 64, 64)
    x = torch.randn(shape, device="cuda", dtype=dtype)
    with float32_precision(Float32Precision.IEEE):
        try:
            forward = ensemble.build(name, models, x)
        except UnavailableError as error:
            pytest.skip(str(error))
        loop = strategies.build("loop", models, x)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        found, expected = [], []
        for index in range(6):  # without a synchronization: streams alone order the calls
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                images = torch.randn(shape, device="cuda", dtype=dtype) * (index + 1)
                found.append(forward(images))
                expected.append(loop(images))
            torch.cuda.current_stream().wait_stream(stream)
        for one, other in zip(found, expected, strict=True):
            scale = float(other.float().abs().max())
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)
