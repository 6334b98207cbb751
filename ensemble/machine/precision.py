"""How CUDA multiplies float32 numbers: in float32 (IEEE 754), or in TensorFloat-32 (TF32).

TF32 rounds the factors to 10 bits of mantissa. By torch's defaults, convolutions use it and matrix
products do not. Source: torch's notes on CUDA semantics, "TensorFloat-32 (TF32)".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch

# The flags belong to the process: two threads that set and restore them would mix theirs.
_LOCK = threading.RLock()


class Float32Precision(StrEnum):
    """Of products of float32 numbers on CUDA."""

    IEEE = "ieee"
    TF32 = "tf32"


def set_float32_precision(precision: Float32Precision) -> None:
    """Set the precision of convolutions and matrix products of this process."""
    uses_tf32 = precision is Float32Precision.TF32
    # These flags also set the newer `fp32_precision` of each operator.
    torch.backends.cuda.matmul.allow_tf32 = uses_tf32
    torch.backends.cudnn.allow_tf32 = uses_tf32


def switch_float32_precision(precision: Float32Precision, device: torch.device) -> None:
    """`set_float32_precision` where it has an effect: on CUDA."""
    if device.type == "cuda":
        set_float32_precision(precision)


@contextmanager
def float32_precision(precision: Float32Precision) -> Iterator[None]:
    """A context in which CUDA multiplies float32 numbers in this precision; the flags of the caller
    are restored. Other threads of the process compute in it too, and wait to set another."""
    operators = (*_operators(), torch.backends.cudnn.rnn)
    with _LOCK:
        before = [operator.fp32_precision for operator in operators]
        try:
            set_float32_precision(precision)
            yield
        finally:
            # First the older flags, whose setters also set the newer ones.
            torch.backends.cuda.matmul.allow_tf32 = before[0] == Float32Precision.TF32
            torch.backends.cudnn.allow_tf32 = before[1] == Float32Precision.TF32
            for operator, own in zip(operators, before, strict=True):
                operator.fp32_precision = own


def current_float32_precision() -> Float32Precision:
    """TF32 if convolutions or matrix products of float32 numbers use it."""
    uses_tf32 = any(operator.fp32_precision == Float32Precision.TF32 for operator in _operators())
    return Float32Precision.TF32 if uses_tf32 else Float32Precision.IEEE


def _operators() -> tuple[Any, Any]:
    """The flags of matrix products and of convolutions, which torch does not annotate."""
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
