"""The operators: each file holds one, or a tight family, from its definition to its lowering.

A file exports two tables. `LOWERINGS`: from an operator of the vmapped graph to the function that
turns a node into steps. `REFERENCES`: from the kind of a step to the same by torch's own operators.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ensemble.compiler.operators import (
    activation,
    affine,
    arithmetic,
    channel_conv,
    concatenation,
    conv2d,
    gather,
    group_norm,
    layer_norm,
    pixel_shuffle,
    pooling,
    resample,
)
from ensemble.compiler.operators.lowering import Lowering
from ensemble.compiler.planning.step import Kind

OPERATORS: tuple[ModuleType, ...] = (
    activation,
    affine,
    arithmetic,
    channel_conv,
    concatenation,
    conv2d,
    gather,
    group_norm,
    layer_norm,
    pixel_shuffle,
    pooling,
    resample,
)

LOWERINGS: dict[Any, Lowering] = {
    target: lower for operator in OPERATORS for target, lower in operator.LOWERINGS.items()
}
REFERENCES: dict[Kind, Callable[..., Tensor]] = {
    kind: compute for operator in OPERATORS for kind, compute in operator.REFERENCES.items()
}
