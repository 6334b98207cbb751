"""Names of `--dtype`, and what they stand for."""

import pytest
import torch

from ensemble.errors import UnavailableError
from ensemble.machine import dtypes
from ensemble.machine.dtypes import FLOAT32, NumericFormat, check_supported, numeric_format
from ensemble.machine.precision import Float32Precision
from ensemble.strategies.agreement import tolerance_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
IEEE, TF32 = Float32Precision.IEEE, Float32Precision.TF32


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "tolerance"),
    [
        ("float32", torch.float32, IEEE, 1e-4),
        ("tf32", torch.float32, TF32, 1e-3),
        ("bfloat16", torch.bfloat16, IEEE, 3e-2),
        ("float16", torch.float16, IEEE, 3e-2),
    ],
)
def test_a_format_has_a_dtype_a_precision_of_products_and_a_tolerance(
    name: str, dtype: torch.dtype, precision: Float32Precision, tolerance: float
) -> None:
    found = numeric_format(name)
    assert found == NumericFormat(name, dtype, precision)
    assert tolerance_of(found) == tolerance


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="of float32, tf32, bfloat16, float16, got 'int8'"):
        numeric_format("int8")


def test_tf32_requires_cuda_and_the_capability_of_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tf32 = numeric_format("tf32")
    with pytest.raises(UnavailableError, match="tf32 requires a CUDA device, got cpu"):
        check_supported(tf32, CPU)
    with pytest.raises(UnavailableError, match=r"requires compute capability 8\.0, got 7\.5"):
        check_supported(tf32, CUDA)
    capability = (9, 0)
    check_supported(tf32, CUDA)
    check_supported(FLOAT32, CPU)


def test_formats_other_than_tf32_do_not_ask_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> tuple[int, int]:
        raise AssertionError("CUDA is initialized")

    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    for name in ("float32", "bfloat16", "float16"):
        check_supported(numeric_format(name), CUDA)
    assert dtypes.is_emulated(torch.float32, CPU) is False
