"""TensorRT: an engine for each model, on streams of torch, as launches or as one CUDA graph.

Networks are strongly typed: they compute in the dtype of the ONNX graph, with TF32 only where the
caller's flags allow it. Engines share a timing cache, so that only the first measures its kernels,
and all of them use the same. An engine of its own for each model lets TensorRT transform the
weights at build, which refitting one engine would restrict.

Source: TensorRT's Python API, version 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.compiler.graph.batch_norm_folding import folded
from ensemble.errors import UnavailableError
from ensemble.machine.devices import MAX_STREAMS
from ensemble.strategies import peer_autotune, peer_conversion, peer_streams
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.peer_autotune import Settings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One export, then an engine with the weights of each model.

    Raises:
        UnavailableError: a package is missing, the models cannot be converted, or the outputs
            disagree.
    """
    package = peer_conversion.require("tensorrt", example.device)
    output = peer_conversion.check_convertible(models, example)
    batch = peer_autotune.batches(example, len(models))[0]
    graphs = peer_conversion.to_onnx(folded(models, example), batch)
    engines = build_engines(package, graphs, tf32=peer_conversion.uses_tf32())
    built = peer_autotune.select_fastest(
        _settings(package, engines, example, output),
        example,
        len(models),
        tuning_models=peer_streams.tuning_size(len(models)),
    )
    return peer_conversion.checked(built, models, example)


def build_engines(package: Any, graphs: Sequence[bytes], *, tf32: bool) -> list[Any]:
    """An engine for each ONNX graph.

    Raises:
        UnavailableError: TensorRT cannot parse or build one.
    """
    logger = package.Logger(package.Logger.ERROR)
    builder, runtime = package.Builder(logger), package.Runtime(logger)
    cache, engines = None, []
    for graph in graphs:
        strongly_typed = 1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        parser = package.OnnxParser(network, logger)
        if not parser.parse(graph):
            raise UnavailableError(f"TensorRT cannot parse it: {parser.get_error(0).desc()}")
        config = builder.create_builder_config()
        cache = cache or config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        set_or_clear = config.set_flag if tf32 else config.clear_flag  # set by default
        set_or_clear(package.BuilderFlag.TF32)
        plan = builder.build_serialized_network(network, config)
        engine = None if plan is None else runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UnavailableError("TensorRT cannot build an engine; see its error above")
        engines.append(engine)
    return engines


def _settings(package: Any, engines: Sequence[Any], example: Tensor, output: Tensor) -> Settings:
    def bind(index: int, x: Tensor, logits: Tensor, stream: Any) -> Callable[[], None]:
        return bound(package, engines[index], x, logits, stream)

    return {
        name: partial(
            peer_streams.on_streams, bind, example, output, max_streams=streams, capture=capture
        )
        for name, streams, capture in (
            ("sequential", 1, False),
            ("streams", MAX_STREAMS, False),
            ("sequential, one CUDA graph", 1, True),
            ("streams, one CUDA graph", MAX_STREAMS, True),
        )
    }


def bound(package: Any, engine: Any, x: Tensor, logits: Tensor, stream: Any) -> Callable[[], None]:
    """A function that queues one forward of `engine` on the stream, from the memory of x into that
    of logits."""
    context = engine.create_execution_context()
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == package.TensorIOMode.INPUT
        context.set_tensor_address(name, (x if is_input else logits).data_ptr())

    def enqueue() -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not queue a forward")

    return enqueue
