"""A compiled forward for another batch size, over the same weights, without another trace.

Only for models that treat the images of a batch independently, and for graphs in which the batch
size shows in the programs' steps and in final reshapes only; others are traced again.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ensemble.compiler.graph.graph_module import finished, forget_source
from ensemble.compiler.runtime.program import Program


def rebatched(module: fx.GraphModule, num_models: int, old: int, new: int) -> fx.GraphModule | None:
    """The forward of N models for `new` images instead of `old`; None if its graph holds more that
    depends on their number.

    Args:
        module: x -> `(N, old, ...)`, with programs.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    parts = nn.Module()
    for node in module.graph.nodes:
        arguments: tuple[Any, ...] = node.args
        if node.op == "call_module":
            program = module.get_submodule(str(node.target))
            if not isinstance(program, Program) or not _has_images(program, old):
                return None
            parts.add_module(str(node.target), _with_images(program, new))
        elif node.op == "call_function" and node.target is torch.ops.aten.reshape.default:
            if list(arguments[1][:2]) != [num_models, old] or -1 in arguments[1]:
                return None
            arguments = (arguments[0], [num_models, new, *arguments[1][2:]])
        elif node.op not in ("placeholder", "output") and node.target is not operator.getitem:
            return None
        copied = fx.node.map_arg(arguments, copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, copied, {}, node.name)
    found = fx.GraphModule(parts, graph)
    forget_source(found)
    return finished(found)


def _has_images(program: Program, images: int) -> bool:
    return all(step.geometry.images == images for step in program.steps)


def _with_images(program: Program, images: int) -> Program:
    steps = [
        replace(step, geometry=replace(step.geometry, images=images)) for step in program.steps
    ]
    return program.with_steps(steps)
