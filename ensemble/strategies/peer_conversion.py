"""Parts that the runtimes share: their packages, the ONNX graph, and a check of the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ensemble.artifacts import onnx as onnx_file
from ensemble.compiler.graph.call_trace import record
from ensemble.errors import UnavailableError
from ensemble.machine.precision import Float32Precision, current_float32_precision
from ensemble.models import stacking
from ensemble.models.outputs import class_count, is_class_logits
from ensemble.strategies import agreement, eager, telemetry
from ensemble.strategies.build_result import BuildResult
from ensemble.strategies.stacked_outputs import stack_outputs

REQUIREMENTS = {"cpu": "requirements-peers.txt", "cuda": "requirements-peers-cuda.txt"}


def require(name: str, device: torch.device) -> Any:
    """The package `name`.

    Raises:
        UnavailableError: it is not installed; the message says how to install it.
    """
    telemetry.switch_off()
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {install_advice(device)}") from error


def install_advice(device: torch.device) -> str:
    """`pip install -r` of the runtimes for this kind of device."""
    return f"pip install -r {REQUIREMENTS[device.type]}"


def uses_tf32() -> bool:
    """Whether the caller's flags allow TF32 in products of float32 numbers: runtimes follow them,
    so that a row in float32 computes in float32."""
    return current_float32_precision() is Float32Precision.TF32


def check_convertible(models: Sequence[nn.Module], example: Tensor) -> Tensor:
    """Check that a traced conversion is valid for other inputs and preserves the output dtype.

    Returns:
        The output of model 0 for its batch, whose values do not matter.

    Raises:
        UnavailableError: it does not: tracing specializes data-dependent control flow, and peers
            return the dtype of the input.
    """
    x = agreement.informative(example)
    found = record(stacking.private_copy(models[0]), (x[0] if x.dim() == 5 else x).clone())
    if found.reads_values:
        raise UnavailableError("the converter does not support data-dependent control flow")
    if not isinstance(found.result, Tensor):
        kind = type(found.result).__name__
        raise UnavailableError(f"the converter requires models that return one tensor, got {kind}")
    if found.result.dtype != example.dtype:
        dtypes = f"{example.dtype}, but the models return {found.result.dtype}"
        raise UnavailableError(f"the converted models return {dtypes}")
    return found.result


def checked(built: BuildResult, models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """`built`, after comparing it with the models on the example and on another image.

    A conversion may be silently wrong, and in later calls only: OpenVINO 2026.4 overwrites a
    convolved constant with its difference from the input.

    Raises:
        UnavailableError: the outputs disagree.
    """
    tolerance = agreement.current_tolerance(example.dtype, example.device)
    for x in (example, example.flip(-1)):
        found = stack_outputs(built.forward(x), len(models))
        reference = eager.logits_in(models, x, torch.float32)
        has_classes = is_class_logits(reference, class_count(models[0]))
        check = partial(agreement.check, tolerance=tolerance, has_classes=has_classes)
        problem = check(found, reference).problem
        if problem:
            raise UnavailableError(f"the converted models disagree with the original: {problem}")
    return built


def to_onnx(models: Sequence[nn.Module], batch: Tensor) -> list[bytes]:
    """The serialized ONNX graph of each model: one export, then the weights of each.

    Args:
        models: alike, in the dtype of `batch`, without batch norms that a runtime would fold.
        batch: `(B, ...)`; the graphs accept this shape only.

    Raises:
        UnavailableError: a package of the exporter is not installed.
    """
    onnx = require("onnx", batch.device)
    require("onnxscript", batch.device)
    # No optimization at export: it would constant-fold this model's weights (3 * parameter) into
    # initializers that the next model's weights do not replace. The runtimes fold later.
    arguments = (batch.clone(memory_format=torch.contiguous_format),)
    model = _contiguous(models[0])
    proto = onnx_file.to_proto(model, arguments, dtype=batch.dtype, optimize=False)
    graphs = []
    for model in models:
        _set_initializers(onnx, proto, stacking.named_tensors(model))
        graphs.append(proto.SerializeToString())
    return graphs


def _contiguous(model: nn.Module) -> nn.Module:
    """A copy whose weights are not channels-last: for those torch exports average pooling with a
    gather of the pooled values."""
    copy = stacking.skeleton(model).eval()
    tensors = stacking.named_tensors(model).items()
    stacking.set_tensors(copy, {name: tensor.clone().contiguous() for name, tensor in tensors})
    return copy


def _set_initializers(onnx: Any, proto: Any, state: dict[str, Tensor]) -> None:
    for initializer in proto.graph.initializer:
        if initializer.name in state:
            tensor = state[initializer.name].cpu().contiguous()
            replacement = onnx.TensorProto(
                name=initializer.name,
                data_type=initializer.data_type,
                dims=tensor.shape,
                raw_data=tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
            initializer.CopyFrom(replacement)
