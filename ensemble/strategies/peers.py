"""The alternatives: OpenVINO, ONNX Runtime and JAX, with the same weights, on the CPU.

Each is configured as its documentation recommends, with all cores, in several settings, of which
`peer_autotune` keeps the fastest, because none is the fastest everywhere. Telemetry is disabled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import folded
from ensemble.compiler.graph.call_trace import record
from ensemble.errors import UnavailableError
from ensemble.machine.dtypes import is_emulated
from ensemble.models import stacking
from ensemble.strategies import (
    agreement,
    eager,
    peer_autotune,
    telemetry,
)
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.forward import stack_outputs
from ensemble.strategies.peer_autotune import Array, RunModels, Settings

_OPENVINO_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a peer does not support a dtype on a device; empty if it does."""
    if name == "onnxruntime" and dtype != torch.float32:
        return f"ONNX Runtime has no CPU convolution in {dtype}"
    if name == "openvino" and (dtype not in _OPENVINO_HINTS or is_emulated(dtype, device)):
        return f"OpenVINO does not support {dtype} on this CPU"
    return ""


def openvino(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """OpenVINO's CPU plugin, in float32 or bfloat16 by precision hint. Its relu maps NaN to 0."""
    package = _require("openvino", example)
    core = package.Core()
    _check_dtype("openvino", example)
    hint = _OPENVINO_HINTS[example.dtype]
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError(f"OpenVINO does not support {example.dtype} on this CPU")
    _check_convertible(models, example)
    inputs = peer_autotune.arrays(example, len(models))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the tracer of torch modules
        graphs = [
            package.convert_model(model, example_input=torch.from_numpy(batch), input=batch.shape)
            for model, batch in zip(_in_float32(models, example), inputs, strict=True)
        ]
    cores = torch.get_num_threads()
    settings = _openvino_settings(core, graphs, cores=cores, precision=hint)
    built = peer_autotune.select_fastest(
        settings, example, len(models), tuning_models=peer_autotune.tuning_size(len(models), cores)
    )
    return _checked(built, models, example)


def _openvino_settings(core: Any, graphs: list[Any], *, cores: int, precision: str) -> Settings:
    def requests(count: int, **config: object) -> list[Any]:
        config["INFERENCE_PRECISION_HINT"] = precision
        return [
            core.compile_model(graph, "CPU", config).create_infer_request()
            for graph in graphs[:count]
        ]

    def sequential(count: int) -> RunModels:
        compiled = requests(count, PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=cores)
        return lambda batches: list(map(_infer, compiled, batches))

    def one_per_core(count: int) -> RunModels:
        compiled = requests(count, NUM_STREAMS=1, INFERENCE_NUM_THREADS=1)
        pool = ThreadPoolExecutor(cores)
        return lambda batches: list(pool.map(_infer, compiled, batches))

    def throughput(count: int) -> RunModels:
        compiled = requests(count, PERFORMANCE_HINT="THROUGHPUT", INFERENCE_NUM_THREADS=cores)

        def run(batches: list[Array]) -> list[Array]:
            for request, batch in zip(compiled, batches, strict=True):
                request.start_async([batch])
            for request in compiled:
                request.wait()
            return [request.get_output_tensor(0).data.copy() for request in compiled]

        return run

    return {
        "sequential": sequential,
        "one per core": one_per_core,
        "throughput hint": throughput,
    }


def onnxruntime(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """ONNX Runtime's CPU provider, in float32: one export, then the weights of each model."""
    package, onnx = _require("onnxruntime", example), _require("onnx", example)
    _require("onnxscript", example)
    _check_dtype("onnxruntime", example)
    _check_convertible(models, example)
    copies = folded(models, example)
    inputs = peer_autotune.arrays(example, len(models))
    proto = _export(copies[0], torch.from_numpy(inputs[0]))
    graphs = []
    for copy in copies:
        _set_initializers(onnx, proto, stacking.named_tensors(copy))
        graphs.append(proto.SerializeToString())
    cores = torch.get_num_threads()

    def sessions(count: int, threads: int) -> list[Any]:
        options = package.SessionOptions()
        options.log_severity_level = 3  # errors only: it warns of every constant it cannot fold
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        providers = ["CPUExecutionProvider"]
        return [package.InferenceSession(graph, options, providers) for graph in graphs[:count]]

    def infer(session: Any, batch: Array) -> Array:
        logits: Array = session.run(None, {session.get_inputs()[0].name: batch})[0]
        return logits

    def sequential(count: int) -> RunModels:
        prepared = sessions(count, cores)
        return lambda batches: list(map(infer, prepared, batches))

    def one_per_core(count: int) -> RunModels:
        prepared, pool = sessions(count, 1), ThreadPoolExecutor(cores)
        return lambda batches: list(pool.map(infer, prepared, batches))

    settings = {"sequential": sequential, "one per core": one_per_core}
    built = peer_autotune.select_fastest(
        settings, example, len(models), tuning_models=peer_autotune.tuning_size(len(models), cores)
    )
    return _checked(built, models, example)


def jax(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """JAX's CPU backend; see `jax_resnet`."""
    _require("jax", example)
    from ensemble.strategies import jax_resnet

    loop, vmap = jax_resnet.forwards(folded(models, example), example)
    settings = {"jit of each model": lambda _: loop, "jit of vmap": lambda _: vmap}
    return peer_autotune.select_fastest(settings, example, len(models), tuning_models=len(models))


def _require(name: str, example: Tensor) -> Any:
    if example.device.type != "cpu":
        raise UnavailableError(f"{name} supports only the CPU here, got {example.device}")
    telemetry.switch_off()
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"{name} is not installed: pip install -r requirements-peers.txt"
        ) from error


def _check_dtype(name: str, example: Tensor) -> None:
    if reason := why_not(name, example.dtype, example.device):
        raise UnavailableError(reason)


def _check_convertible(models: Sequence[nn.Module], example: Tensor) -> None:
    """Check that a traced conversion is valid for other inputs and preserves the output dtype.

    Raises:
        UnavailableError: it does not: tracing specializes data-dependent control flow, and peers
            return the dtype of the input.
    """
    x = agreement.informative(example)
    found = record(stacking.private_copy(models[0]), (x[0] if x.dim() == 5 else x).clone())
    if found.reads_values:
        raise UnavailableError("the converter does not support data-dependent control flow")
    if isinstance(found.result, Tensor) and found.result.dtype != example.dtype:
        dtypes = f"{example.dtype}, but the models return {found.result.dtype}"
        raise UnavailableError(f"the converted models return {dtypes}")


def _in_float32(models: Sequence[nn.Module], example: Tensor) -> Sequence[nn.Module]:
    """Copies in float32, as a converter calls the models, which may mutate their state."""
    if weight_dtype(models, example) == torch.float32:
        return list(map(stacking.private_copy, models))
    return stacking.cast(models, torch.float32)


def _checked(built: BuildResult, models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """`built`, after comparing it with the models on the example and on another image.

    A conversion may be silently wrong, and in later calls only: OpenVINO 2026.4 overwrites a
    convolved constant with its difference from the input.

    Raises:
        UnavailableError: the outputs disagree.
    """
    tolerance = agreement.TOLERANCES[example.dtype]
    for x in (example, example.flip(-1)):
        problem = agreement.check(
            stack_outputs(built.forward(x), len(models)),
            eager.logits_in(models, x, torch.float32),
            tolerance=tolerance,
        ).problem
        if problem:
            raise UnavailableError(f"the converted models disagree with the original: {problem}")
    return built


def _infer(request: Any, batch: Array) -> Array:
    logits: Array = request.infer([batch])[0].copy()  # the request reuses its output buffer
    return logits


def _export(model: nn.Module, batch: Tensor) -> Any:
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        # No optimization at export: it would constant-fold this model's weights (3 * parameter)
        # into initializers that the next model's weights do not replace. ONNX Runtime folds later.
        program = torch.onnx.export(
            model, (batch.clone(),), dynamo=True, verbose=False, optimize=False
        )
    assert program is not None
    return program.model_proto


def _set_initializers(onnx: Any, proto: Any, state: dict[str, Tensor]) -> None:
    for initializer in proto.graph.initializer:
        if initializer.name in state:
            array = state[initializer.name].contiguous().numpy()
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
