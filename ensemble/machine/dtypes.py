"""Native and emulated dtypes of a device."""

import time

import torch

SIDE, CHANNELS = 56, 64  # of the timed convolution: one of ResNet-18's first stage
CALLS = 3


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
