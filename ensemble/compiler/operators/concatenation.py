"""Concatenation along the channels: torch's own operator, lowered to a copy for each input."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.operators.lowering import Lowering, LoweringContext, elementwise_step
from ensemble.compiler.planning.shape_inference import pointwise
from ensemble.compiler.planning.step import Kind, Step


def _lower(node: fx.Node, context: LoweringContext) -> list[Step]:
    sources, dim = (*node.args, 0)[:2]
    assert isinstance(sources, list | tuple)
    if dim not in (2, -3) or node.kwargs or not all(map(context.is_stack, sources)):
        return []
    result, first, steps = node.meta["val"], 0, []
    geometry = pointwise(result)
    for source in sources:
        step = elementwise_step(Kind.COPY, node, context, source, option=first)
        wide = replace(step.geometry, out_channels=geometry.out_channels)
        steps.append(replace(step, geometry=wide, out_channels=result.shape[-3]))
        first += context.tensor(source).shape[-3]
    return steps


LOWERINGS: dict[Any, Lowering] = {torch.ops.aten.cat.default: _lower}


def _reference(step: Step, _: None, __: None, x: Tensor) -> Tensor:
    """x at its channels of the result, zeros elsewhere: the copies of a concatenation add up."""
    after = step.unpadded_out_channels - step.option - x.shape[-3]
    return functional.pad(x, (0, 0, 0, 0, step.option, after))


REFERENCES = {Kind.COPY: _reference}
