"""Convolutions of N models as batched matrix products, by torch's own kernels.

To torch, N stacked convolutions are one grouped convolution, for which cuDNN has no fast kernel.
im2col (Chellapilla, Puri and Simard, 2006) turns each model's convolution into a matrix product,
and `torch.bmm` computes all N at once.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

ALIGNMENT = 8  # elements of a row: aligned for loads of 16 bytes, in 2-byte dtypes too


def conv2d(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A convolution without bias, dilation and groups: `(N, B, K, OH, OW)`, channels-last.

    Args:
        x: `(N, B, C, H, W)`, or `(B, C, H, W)` shared by all models.
        weight: `(N, K, C, R, S)`.
        stride: in y and x.
        padding: zero padding, in y and x.
    """
    num_models, out_channels, _, *kernel = weight.shape
    patches = _patches(x, kernel, stride, padding)
    size = patches.shape[-6:-3]  # B, OH, OW
    rows = patches.flatten(-3).flatten(-4, -2)
    matrix = weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
    missing = -rows.shape[-1] % ALIGNMENT
    if missing:
        rows = functional.pad(rows, (0, missing))
        matrix = functional.pad(matrix, (0, 0, 0, missing))
    if x.dim() == 5:
        return (rows @ matrix).unflatten(1, size).permute(0, 1, 4, 2, 3)
    wide = rows @ matrix.movedim(0, 1).flatten(1)  # one product over all models' filters
    return wide.view(*size, num_models, out_channels).permute(3, 0, 4, 1, 2)


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`(..., B, OH, OW, R, S, C)`, a view where nothing is padded."""
    x = x.movedim(-3, -1)
    if any(padding):
        x = functional.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return x.unfold(-3, kernel[0], stride[0]).unfold(-3, kernel[1], stride[1]).movedim(-3, -1)
