"""The numeric formats of a row; native and emulated dtypes of a device."""

import time
from dataclasses import dataclass

import torch

from ensemble.errors import UnavailableError
from ensemble.machine.precision import Float32Precision

TF32_CAPABILITY = (8, 0)  # compute capability of the first GPUs with TF32: Ampere
SIDE, CHANNELS = 56, 64  # of the timed convolution: one of ResNet-18's first stage
CALLS = 3


@dataclass(frozen=True)
class NumericFormat:
    """What a name of `--dtype` stands for: the dtype of weights and inputs, and the precision of
    float32 products on CUDA."""

    name: str
    dtype: torch.dtype
    float32_precision: Float32Precision = Float32Precision.IEEE

    @property
    def uses_tf32(self) -> bool:
        return self.float32_precision is Float32Precision.TF32

    def why_not(self, device_type: str) -> str:
        """Why a kind of device does not have the format; empty if it may have it."""
        if not self.uses_tf32 or device_type == "cuda":
            return ""
        return f"{self.name} requires a CUDA device, got {device_type}"


FLOAT32 = NumericFormat("float32", torch.float32)
_FORMATS = {
    one.name: one
    for one in (
        FLOAT32,
        NumericFormat("tf32", torch.float32, Float32Precision.TF32),
        NumericFormat("bfloat16", torch.bfloat16),
        NumericFormat("float16", torch.float16),
    )
}


def numeric_format(name: str) -> NumericFormat:
    """The format of a name of `--dtype`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _FORMATS:
        raise ValueError(f"expected a format of {', '.join(_FORMATS)}, got {name!r}")
    return _FORMATS[name]


def check_supported(numbers: NumericFormat, device: torch.device) -> None:
    """Raise UnavailableError unless `device` computes in the format. Initializes CUDA for TF32."""
    reason = numbers.why_not(device.type)
    if not reason and numbers.uses_tf32:
        capability = torch.cuda.get_device_capability(device)
        if capability < TF32_CAPABILITY:
            required, found = (".".join(map(str, one)) for one in (TF32_CAPABILITY, capability))
            reason = f"{numbers.name} requires compute capability {required}, got {found}"
    if reason:
        raise UnavailableError(reason)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the CPU lacks instructions for `dtype`, so that torch converts each element.

    Queries oneDNN, torch's convolution backend on the CPU, and thus respects ONEDNN_MAX_CPU_ISA.
    """
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if device.type != "cpu" or dtype not in supported:
        return False
    return (
        not torch.backends.mkldnn.is_available()
        or not getattr(torch.ops.mkldnn, supported[dtype])()
    )


def slowdown(dtype: torch.dtype) -> float:
    """The time of a convolution in `dtype` relative to float32, on the CPU."""
    return _min_seconds(dtype) / _min_seconds(torch.float32)


def _min_seconds(dtype: torch.dtype) -> float:
    x = torch.ones(1, CHANNELS, SIDE, SIDE, dtype=dtype, device="cpu")
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype, device="cpu")
    times = []
    with torch.inference_mode():
        for _ in range(CALLS):
            start = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            times.append(time.perf_counter() - start)
    return min(times)
