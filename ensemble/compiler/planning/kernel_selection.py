"""Kernel selection: which nodes of the vmapped graph become steps, and which run in one program.

The operators know how they lower (`operators.LOWERINGS`). This pass groups the nodes that do into
maximal runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ensemble.compiler.operators import LOWERINGS
from ensemble.compiler.operators.conv2d import STACKED_CONV2D
from ensemble.compiler.operators.lowering import LoweringContext
from ensemble.compiler.planning.step import Step
from ensemble.compiler.planning.vector_layout import is_narrow

Run = dict[fx.Node, list[Step]]


def select_kernels(
    graph: fx.Graph, dynamic: Collection[fx.Node], context: LoweringContext
) -> list[Run]:
    """Maximal runs of consecutive dynamic nodes with kernels, each node with its steps.

    A run needs one of our operators: without one, torch is as fast.
    """
    runs: list[Run] = [{}]
    for node in graph.nodes:
        if node not in dynamic or node.op == "placeholder":
            continue
        steps = lower(node, context)
        if not steps or not _extends(runs[-1], node):
            runs.append({})
        if steps:
            runs[-1][node] = steps
    return [run for run in runs if any(map(_is_ours, run))]


def lower(node: fx.Node, context: LoweringContext) -> list[Step]:
    """The steps that compute a node; none where no kernel can, or where it mixes dtypes: a program
    has one."""
    rule = LOWERINGS.get(node.target)
    inputs = context.dynamic_inputs(node)
    if rule is None or any(_dtype(source) != _dtype(node) for source in inputs):
        return []
    return rule(node, context)


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ensemble"


def _extends(run: Run, node: fx.Node) -> bool:
    """May a node run in one program with those of a run?"""
    first = next(iter(run), node)
    return _dtype(first) == _dtype(node) and not _reads_nchw(node, run)


def _reads_nchw(node: fx.Node, run: Run) -> bool:
    """Is it a convolution of few channels, which reads NCHW, on a value of the run, in NHWC?"""
    if node.target is not STACKED_CONV2D or node.args[0] not in run:
        return False
    arguments: tuple[Any, ...] = node.args
    x, *_, kernel, _, _, _, groups, _ = arguments
    return is_narrow(x.meta["val"].shape[-3], tuple(kernel), groups)


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype
