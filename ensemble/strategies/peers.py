"""The alternatives: OpenVINO, ONNX Runtime, TensorRT and JAX, with the same weights.

Each is configured as its documentation recommends, in several settings, of which `peer_autotune`
keeps the fastest, because none is the fastest everywhere: on the CPU with all cores, on CUDA with
inputs and outputs on the device. Telemetry is disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ensemble.errors import UnavailableError
from ensemble.machine.dtypes import is_emulated
from ensemble.machine.memory import unavailable_on_failure
from ensemble.strategies import peer_jax, peer_onnxruntime, peer_openvino, peer_tensorrt
from ensemble.strategies.build_result import Builder, BuildResult

_DEVICES = {
    "openvino": ("cpu",),
    "onnxruntime": ("cpu", "cuda"),
    "jax": ("cpu", "cuda"),
    "tensorrt": ("cuda",),
}
_NAMES = {"cpu": "the CPU", "cuda": "CUDA"}


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a peer does not support a dtype on a device; empty if it does, or is no peer."""
    if name not in _DEVICES:
        return ""
    if device.type not in _DEVICES[name]:
        supported = " and ".join(_NAMES[kind] for kind in _DEVICES[name])
        return f"{name} supports only {supported} here, got {device}"
    if name == "openvino" and (dtype not in peer_openvino.HINTS or is_emulated(dtype, device)):
        return f"OpenVINO does not support {dtype} on this CPU"
    if name == "onnxruntime" and dtype not in peer_onnxruntime.DTYPES[device.type]:
        missing = "CPU convolution" if device.type == "cpu" else "CUDA max pooling"
        return f"ONNX Runtime has no {missing} in {dtype}"
    if name == "tensorrt" and dtype not in peer_tensorrt.DTYPES:
        return f"TensorRT does not support {dtype}"
    return ""


def _supported(name: str, build: Builder, models: Sequence[nn.Module], x: Tensor) -> BuildResult:
    """`build(models, x)` where the peer supports x.

    On CUDA its own failures mean unavailable: a missing library, or an operator or a device that it
    does not support. Its allocator is not torch's, which a figure of memory counts: a note says so.
    """
    if reason := why_not(name, x.dtype, x.device):
        raise UnavailableError(reason)
    if x.device.type != "cuda":
        return build(models, x)
    failed = f"{name} cannot run these models on {x.device}"
    with torch.cuda.device(x.device), unavailable_on_failure(failed):
        built = build(models, x)
    return replace(built, note=f"{built.note}; memory: without that of {name}'s own allocator")


def openvino(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """OpenVINO's CPU plugin, see `peer_openvino`."""
    return _supported("openvino", peer_openvino.build, models, example)


def onnxruntime(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """ONNX Runtime's CPU or CUDA provider, see `peer_onnxruntime`."""
    return _supported("onnxruntime", peer_onnxruntime.build, models, example)


def tensorrt(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """TensorRT, see `peer_tensorrt`."""
    return _supported("tensorrt", peer_tensorrt.build, models, example)


def jax(models: Sequence[nn.Module], example: Tensor) -> BuildResult:
    """JAX on the CPU or on CUDA, see `peer_jax`."""
    return _supported("jax", peer_jax.build, models, example)
