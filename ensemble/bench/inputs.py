"""Inputs that never repeat: what answers from a cache, or does not look at them, is found out."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

# Steps through the rows and columns of an image, and through its brightness: a Fibonacci lattice
# and the golden ratio, so that successive images differ much.
ROW_STEP, COLUMN_STEP, BRIGHTNESS_STEP = 89, 55, 0.6180339887498949
DARKEST = 0.5


def vary(example: Tensor, number: int, *, out: Tensor) -> None:
    """Write the variant `number` of an example to `out`: shifted around the edges, and darker.

    Variant 0 is the example. Nothing is allocated, so that the heap is as the forwards leave it.

    Args:
        example: `(..., H, W)`.
        number: 0 or more; variants of two numbers below a million differ.
        out: like `example`.
    """
    brightness = 1 - (1 - DARKEST) * (number * BRIGHTNESS_STEP % 1)
    rows = _shifted(example.shape[-2], number * ROW_STEP)
    columns = _shifted(example.shape[-1], number * COLUMN_STEP)
    for (to_rows, of_rows), (to_columns, of_columns) in product(rows, columns):
        part = out[..., to_rows, to_columns]
        torch.mul(example[..., of_rows, of_columns], brightness, out=part)


def _shifted(size: int, by: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the two parts of a dimension go when it is shifted around its end: (to, from)."""
    by %= size
    return (slice(by, size), slice(0, size - by)), (slice(0, by), slice(size - by, size))
