"""Tests of the precision of float32 products on CUDA. The flags exist without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ensemble.machine.precision import (
    Float32Precision,
    current_float32_precision,
    float32_precision,
    set_float32_precision,
)

OPERATORS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [operator.fp32_precision for operator in OPERATORS]
    yield
    torch.backends.cuda.matmul.allow_tf32 = before[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = before[1] == "tf32"
    for operator, own in zip(OPERATORS, before, strict=True):
        operator.fp32_precision = own


@pytest.mark.parametrize("precision", list(Float32Precision))
def test_a_precision_holds_for_all_operators_and_in_both_interfaces(
    precision: Float32Precision,
) -> None:
    set_float32_precision(precision)
    uses_tf32 = precision is Float32Precision.TF32
    assert current_float32_precision() is precision
    assert torch.backends.cuda.matmul.allow_tf32 is uses_tf32
    assert torch.backends.cudnn.allow_tf32 is uses_tf32
    assert torch.get_float32_matmul_precision() == ("high" if uses_tf32 else "highest")


@pytest.mark.parametrize(
    "of_caller",
    [("tf32", "tf32", "tf32"), ("ieee", "tf32", "tf32"), ("ieee", "tf32", "ieee")],
)
@pytest.mark.parametrize("precision", list(Float32Precision))
def test_the_flags_of_the_caller_are_restored(
    of_caller: tuple[str, ...], precision: Float32Precision
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = of_caller[0] == "tf32"
    for operator, own in zip(OPERATORS, of_caller, strict=True):
        operator.fp32_precision = own
    with float32_precision(precision):
        assert current_float32_precision() is precision
    assert tuple(operator.fp32_precision for operator in OPERATORS) == of_caller
    assert torch.get_float32_matmul_precision() == ("high" if of_caller[0] == "tf32" else "highest")


def test_torchs_defaults_are_restored() -> None:
    OPERATORS[0].fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    with float32_precision(Float32Precision.IEEE):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_flags_are_restored_after_an_error() -> None:
    set_float32_precision(Float32Precision.TF32)
    with pytest.raises(ZeroDivisionError), float32_precision(Float32Precision.IEEE):
        raise ZeroDivisionError
    assert current_float32_precision() is Float32Precision.TF32
