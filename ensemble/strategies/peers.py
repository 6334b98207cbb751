"""What people would use instead: OpenVINO, ONNX Runtime, JAX, from the same weights, on the CPU.

Each is set up as its own documentation recommends, with all cores, in several settings, of which
`trial` keeps the fastest, because none is the fastest everywhere. None of them phones home.
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
from ensemble.compiler.graph.capture import record
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
from ensemble.strategies.build_result import Built
from ensemble.strategies.forward import owned
from ensemble.strategies.peer_autotune import Array, Run, Settings

_OPENVINO_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a peer does not compute in a dtype on a device; empty where it may."""
    if name == "onnxruntime" and dtype != torch.float32:
        return f"ONNX Runtime's CPU kernels do not convolve in {dtype}"
    if name == "openvino" and (dtype not in _OPENVINO_HINTS or is_emulated(dtype, device)):
        return f"OpenVINO does not compute in {dtype} on this CPU"
    return ""


def openvino(models: Sequence[nn.Module], example: Tensor) -> Built:
    """OpenVINO's CPU plugin, float32 or bfloat16 by its precision hint. Its relu makes 0 of NaN."""
    package = _require("openvino", example)
    core = package.Core()
    _check_dtype("openvino", example)
    hint = _OPENVINO_HINTS[example.dtype]
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError(f"OpenVINO does not compute in {example.dtype} on this CPU")
    _check_convertible(models, example)
    inputs = peer_autotune.arrays(example, len(models))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer that reads torch modules
        graphs = [
            package.convert_model(model, example_input=torch.from_numpy(batch), input=batch.shape)
            for model, batch in zip(_in_float32(models, example), inputs, strict=True)
        ]
    cores = torch.get_num_threads()
    settings = _openvino_settings(core, graphs, cores=cores, precision=hint)
    built = peer_autotune.fastest(
        settings, example, len(models), trial=peer_autotune.size(len(models), cores)
    )
    return _checked(built, models, example)


def _openvino_settings(core: Any, graphs: list[Any], *, cores: int, precision: str) -> Settings:
    def requests(count: int, **config: object) -> list[Any]:
        config["INFERENCE_PRECISION_HINT"] = precision
        return [
            core.compile_model(graph, "CPU", config).create_infer_request()
            for graph in graphs[:count]
        ]

    def one_after_another(count: int) -> Run:
        ready = requests(count, PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=cores)
        return lambda batches: list(map(_infer, ready, batches))

    def one_a_core(count: int) -> Run:
        ready = requests(count, NUM_STREAMS=1, INFERENCE_NUM_THREADS=1)
        pool = ThreadPoolExecutor(cores)
        return lambda batches: list(pool.map(_infer, ready, batches))

    def throughput(count: int) -> Run:
        ready = requests(count, PERFORMANCE_HINT="THROUGHPUT", INFERENCE_NUM_THREADS=cores)

        def run(batches: list[Array]) -> list[Array]:
            for request, batch in zip(ready, batches, strict=True):
                request.start_async([batch])
            for request in ready:
                request.wait()
            return [request.get_output_tensor(0).data.copy() for request in ready]

        return run

    return {
        "one after another": one_after_another,
        "one a core": one_a_core,
        "throughput hint": throughput,
    }


def onnxruntime(models: Sequence[nn.Module], example: Tensor) -> Built:
    """ONNX Runtime's CPU provider, float32: exported once, then given each model's weights."""
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
        options.log_severity_level = 3  # errors: else it tells of each constant it cannot fold
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        providers = ["CPUExecutionProvider"]
        return [package.InferenceSession(graph, options, providers) for graph in graphs[:count]]

    def infer(session: Any, batch: Array) -> Array:
        logits: Array = session.run(None, {session.get_inputs()[0].name: batch})[0]
        return logits

    def one_after_another(count: int) -> Run:
        ready = sessions(count, cores)
        return lambda batches: list(map(infer, ready, batches))

    def one_a_core(count: int) -> Run:
        ready, pool = sessions(count, 1), ThreadPoolExecutor(cores)
        return lambda batches: list(pool.map(infer, ready, batches))

    settings = {"one after another": one_after_another, "one a core": one_a_core}
    built = peer_autotune.fastest(
        settings, example, len(models), trial=peer_autotune.size(len(models), cores)
    )
    return _checked(built, models, example)


def jax(models: Sequence[nn.Module], example: Tensor) -> Built:
    """JAX's CPU backend; see `jax_resnet`."""
    _require("jax", example)
    from ensemble.strategies import jax_resnet

    loop, vmap = jax_resnet.forwards(folded(models, example), example)
    settings = {"jit of each model": lambda _: loop, "jit of vmap": lambda _: vmap}
    return peer_autotune.fastest(settings, example, len(models), trial=len(models))


def _require(name: str, example: Tensor) -> Any:
    if example.device.type != "cpu":
        raise UnavailableError(f"{name} is set up for the CPU here, not for {example.device}")
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
    """Would a conversion be right for other images too, and give what the models give?

    Raises:
        UnavailableError: it would not: a converter takes one way through code that branches on
            values, and gives float32.
    """
    x = agreement.informative(example)
    found = record(stacking.private_copy(models[0]), (x[0] if x.dim() == 5 else x).clone())
    if found.reads_values:
        raise UnavailableError("its converter cannot follow code that asks for values of tensors")
    if isinstance(found.result, Tensor) and found.result.dtype != example.dtype:
        raise UnavailableError(f"it gives {example.dtype}, these models {found.result.dtype}")


def _in_float32(models: Sequence[nn.Module], example: Tensor) -> Sequence[nn.Module]:
    """Copies: a converter calls models, which may change what they hold."""
    if weight_dtype(models, example) == torch.float32:
        return list(map(stacking.private_copy, models))
    return stacking.cast(models, torch.float32)


def _checked(built: Built, models: Sequence[nn.Module], example: Tensor) -> Built:
    """What was built, if it still computes what the models compute, for another image as well.

    A conversion may be wrong without a word, and at later calls only: OpenVINO 2026.4 writes the
    difference of a convolved constant and the input over that constant.

    Raises:
        UnavailableError: it computes something else.
    """
    tolerance = agreement.TOLERANCES[example.dtype]
    for x in (example, example.flip(-1)):
        problem = agreement.check(
            owned(built.forward(x), len(models)),
            eager.logits_in(models, x, torch.float32),
            tolerance=tolerance,
        ).problem
        if problem:
            raise UnavailableError(f"converted, these models compute something else: {problem}")
    return built


def _infer(request: Any, batch: Array) -> Array:
    logits: Array = request.infer([batch])[0].copy()  # the request writes into it again
    return logits


def _export(model: nn.Module, batch: Tensor) -> Any:
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        # Not optimised by the exporter: it folds constants of this model's weights (3 * parameter)
        # into new ones, which the next model's weights would not replace. ONNX Runtime does it.
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
