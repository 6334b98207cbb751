"""OpenVINO's CPU plugin, in float32 or bfloat16 by precision hint. Its relu maps NaN to 0."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.strategies import peer_autotune, peer_conversion
from ensemble.strategies.arguments import weight_dtype
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.peer_autotune import RunModels, Settings

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def build(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """One compiled model each."""
    package = peer_conversion.require("openvino", example.device)
    core = package.Core()
    hint = HINTS[example.dtype]
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError(f"OpenVINO does not support {example.dtype} on this CPU")
    peer_conversion.check_convertible(models, example)
    inputs = peer_autotune.batches(example, len(models))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the tracer of torch modules
        graphs = [
            package.convert_model(model, example_input=batch, input=list(batch.shape))
            for model, batch in zip(_in_float32(models, example), inputs, strict=True)
        ]
    cores = torch.get_num_threads()
    built = peer_autotune.select_fastest(
        _settings(core, graphs, cores=cores, precision=hint),
        example,
        len(models),
        tuning_models=peer_autotune.tuning_size(len(models), cores),
    )
    return peer_conversion.checked(built, models, example)


def _settings(core: Any, graphs: list[Any], *, cores: int, precision: str) -> Settings:
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

        def run(batches: list[Tensor]) -> list[Tensor]:
            for request, batch in zip(compiled, batches, strict=True):
                request.start_async([batch.numpy()])
            for request in compiled:
                request.wait()
            return [_copy(request.get_output_tensor(0).data) for request in compiled]

        return run

    return {
        "sequential": sequential,
        "one per core": one_per_core,
        "throughput hint": throughput,
    }


def _infer(request: Any, batch: Tensor) -> Tensor:
    return _copy(request.infer([batch.numpy()])[0])


def _copy(array: Any) -> Tensor:
    return torch.from_numpy(array.copy())  # the request reuses its output buffer


def _in_float32(models: Sequence[nn.Module], example: Tensor) -> Sequence[nn.Module]:
    """Copies in float32, as a converter calls the models, which may mutate their state."""
    if weight_dtype(models, example) == torch.float32:
        return list(map(stacking.private_copy, models))
    return stacking.cast(models, torch.float32)
