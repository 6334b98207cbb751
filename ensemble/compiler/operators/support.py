"""Which tensors and geometries the kernels support. Without numba there are no kernels."""

import torch
from torch import Tensor

from ensemble.compiler.planning.step import Geometry, Kind
from ensemble.compiler.planning.vector_layout import in_vectors
from ensemble.machine import jit

try:
    jit.require()
    from ensemble.compiler import kernels
except ImportError:  # every operator then takes torch's own batching rule
    kernels = None  # type: ignore[assignment]

__all__ = ["can_run", "is_supported", "kernels"]

# Kernels compute in float32; 16-bit dtypes are converted at the boundary of a program.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_supported(x: Tensor) -> bool:
    """Do device and dtype of x have kernels?"""
    return kernels is not None and x.device.type == "cpu" and x.dtype in _DTYPES


def can_run(kind: Kind, x: Tensor, geometry: Geometry) -> bool:
    """Can the kernel run a step of this geometry, with channels padded to vectors, on x?"""
    return is_supported(x) and kernels.can_run(kind, in_vectors(geometry))
