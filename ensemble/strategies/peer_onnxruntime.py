"""ONNX Runtime: a session for each model, on its CPU provider or on its CUDA provider.

On CUDA a session reads and writes memory of torch (IOBinding) on a stream of torch. Sources: ONNX
Runtime's pages "CUDA Execution Provider" and "I/O Binding".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.artifacts.program import BATCH
from ensemble.compiler.graph.batch_norm_folding import folded
from ensemble.errors import UnavailableError
from ensemble.machine.devices import MAX_STREAMS
from ensemble.strategies import peer_autotune, peer_conversion, peer_streams
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.peer_autotune import RunModels, Settings

# Dtypes of a provider's convolution and max pooling, in onnxruntime-gpu 1.31.1. Its CUDA provider
# convolves in bfloat16, but has no max pooling.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.float64)}
_CUDA = "CUDAExecutionProvider"
# An operator without a CUDA kernel is an error, and so is a CUDA provider that cannot be loaded: by
# default the CPU would compute instead.
_CUDA_ONLY = {"disable_cpu_ep_fallback": "1"}
_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11}  # onnx.TensorProto.DataType


def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One export, then a session with the weights of each model.

    Raises:
        UnavailableError: a package is missing, this build has no CUDA provider, the models cannot
            be converted, or the outputs disagree.
    """
    package = peer_conversion.require("onnxruntime", example.device)
    is_cuda = example.device.type == "cuda"
    if is_cuda:
        _check_cuda(package, example.device)
    output = peer_conversion.check_convertible(models, example)
    batch = peer_autotune.batches(example, len(models))[0]
    graphs = peer_conversion.to_onnx(folded(models, example), batch)
    if is_cuda:
        settings = cuda_settings(package, graphs, example, output)
        tuned = peer_streams.tuning_size(len(models))
    else:
        cores = torch.get_num_threads()
        settings = _cpu_settings(package, graphs, cores)
        tuned = peer_autotune.tuning_size(len(models), cores)
    built = peer_autotune.select_fastest(settings, example, len(models), tuning_models=tuned)
    return peer_conversion.checked(built, models, example)


def run_of_file(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The ONNX graph in a file, in one session with all cores, or on CUDA on the current stream.

    Equal subgraphs are not merged: N models with the same weights are N models.
    """
    package = peer_conversion.require("onnxruntime", device)
    merging = ["CommonSubexpressionElimination"]
    if device.type == "cpu":
        threads, providers = torch.get_num_threads(), ["CPUExecutionProvider"]
        return partial(
            _infer, _session(package, str(path), providers, threads=threads, disabled=merging)
        )
    _check_cuda(package, device)
    stream = torch.cuda.current_stream(device)
    options = provider_options(
        stream, device, nhwc=False, graph=False, tf32=peer_conversion.uses_tf32()
    )
    session = _session(
        package, str(path), [(_CUDA, options)], threads=1, disabled=merging, **_CUDA_ONLY
    )
    (images,), (result,) = session.get_inputs(), session.get_outputs()
    if images.type != result.type:
        raise UnavailableError(f"the exported models return {result.type}, expected {images.type}")

    def run(x: Tensor) -> Tensor:
        batch = x.shape[images.shape.index(BATCH)]
        shape = [batch if size == BATCH else size for size in result.shape]
        logits = x.new_empty(shape)
        with torch.cuda.stream(stream):
            bound(package, session, x.contiguous(), logits)()
        return logits

    return run


def _check_cuda(package: Any, device: torch.device) -> None:
    """Raise UnavailableError unless this build of ONNX Runtime has a CUDA provider."""
    if _CUDA not in package.get_available_providers():
        advice = peer_conversion.install_advice(device)
        raise UnavailableError(f"no CUDA provider in this build of onnxruntime: {advice}")


def _session(
    package: Any,
    graph: bytes | str,
    providers: Sequence[str | tuple[str, dict[str, str]]],
    *,
    threads: int,
    disabled: Sequence[str] = (),
    **config: str,
) -> Any:
    """graph: the serialized graph, or the path of its file; disabled: optimizers."""
    options = package.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of every constant it cannot fold
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    for name, value in config.items():
        options.add_session_config_entry(f"session.{name}", value)
    more = {"disabled_optimizers": [*disabled]} if disabled else {}
    return package.InferenceSession(graph, options, providers, **more)


def _infer(session: Any, batch: Tensor) -> Tensor:
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def _cpu_settings(package: Any, graphs: list[bytes], cores: int) -> Settings:
    def sessions(count: int, threads: int) -> list[Any]:
        providers = ["CPUExecutionProvider"]
        return [_session(package, graph, providers, threads=threads) for graph in graphs[:count]]

    def sequential(count: int) -> RunModels:
        prepared = sessions(count, cores)
        return lambda batches: list(map(_infer, prepared, batches))

    def one_per_core(count: int) -> RunModels:
        prepared, pool = sessions(count, 1), ThreadPoolExecutor(cores)
        return lambda batches: list(pool.map(_infer, prepared, batches))

    return {"sequential": sequential, "one per core": one_per_core}


def cuda_settings(package: Any, graphs: list[bytes], example: Tensor, output: Tensor) -> Settings:
    """In either layout: all on one stream, each session as one CUDA graph, or on several streams.

    Several streams do not go with CUDA graphs: a session waits for the end of its graph.
    """

    def setting(*, nhwc: bool, graph: bool, streams: int) -> Callable[[int], RunModels]:
        def bind(index: int, x: Tensor, logits: Tensor, stream: Any) -> Callable[[], None]:
            options = provider_options(
                stream,
                x.device,
                nhwc=nhwc,
                graph=graph,
                tf32=peer_conversion.uses_tf32(),
            )
            session = _session(package, graphs[index], [(_CUDA, options)], threads=1, **_CUDA_ONLY)
            return bound(package, session, x, logits)

        return partial(peer_streams.on_streams, bind, example, output, max_streams=streams)

    return {
        f"{layout}, {launch}": setting(nhwc=nhwc, graph=graph, streams=streams)
        for layout, nhwc in (("NCHW", False), ("NHWC", True))
        for launch, graph, streams in (
            ("sequential", False, 1),
            ("CUDA graphs", True, 1),
            ("streams", False, MAX_STREAMS),
        )
    }


def provider_options(
    stream: Any, device: torch.device, *, nhwc: bool, graph: bool, tf32: bool
) -> dict[str, str]:
    """The options of the CUDA provider; see its page for each."""
    return {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": str(int(tf32)),  # on by default
        "prefer_nhwc": str(int(nhwc)),
        "enable_cuda_graph": str(int(graph)),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",  # else N sessions hold up to twice the memory
    }


def bound(package: Any, session: Any, x: Tensor, logits: Tensor) -> Callable[[], None]:
    """A function that queues one forward of `session`, from the memory of x into that of logits,
    on the session's stream, without waiting for it."""
    binding = session.io_binding()
    for bind, value, tensor in (
        (binding.bind_input, session.get_inputs()[0], x),
        (binding.bind_output, session.get_outputs()[0], logits),
    ):
        bind(
            value.name,
            tensor.device.type,
            tensor.device.index or 0,
            _ONNX_TYPES[tensor.dtype],
            list(tensor.shape),
            tensor.data_ptr(),
        )
    options = package.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return partial(session.run_with_iobinding, binding, options)
