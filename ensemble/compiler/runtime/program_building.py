"""Replace each run of lowered nodes by one `Program`."""

from __future__ import annotations

import operator

from torch import fx

from ensemble.compiler.operators.lowering import LoweringContext
from ensemble.compiler.planning.kernel_selection import Run
from ensemble.compiler.planning.step import Step


def build_program(
    module: fx.GraphModule, run: Run, context: LoweringContext, threads: int
) -> list[Step]:
    """Replace a run of nodes by a call of a program, and return the program's steps."""
    # Without numba nothing is lowered, and these cannot be imported.
    from ensemble.compiler.planning.activation_fusion import fuse_activations
    from ensemble.compiler.runtime.program import Program

    ids = context.value_ids
    outputs = [node for node in run if any(user not in run for user in node.users)]
    lowered = [step for node in run for step in run[node]]
    steps = fuse_activations(lowered, {ids[node] for node in outputs})
    produced = {ids[node] for node in run}
    read = dict.fromkeys(value for step in steps for value in step.reads)
    inputs = [value for value in read if value not in produced]
    first, last = next(iter(run)), next(reversed(run))
    program = Program(
        steps,
        inputs=inputs,
        outputs=[ids[node] for node in outputs],
        num_models=context.num_models,
        threads=threads,
        dtype=first.meta["val"].dtype,
    )
    name = f"program_{ids[first]}"
    module.add_submodule(name, program)
    with module.graph.inserting_before(last):
        results = module.graph.call_module(name, tuple(context.producers[v] for v in inputs))
        for index, node in enumerate(outputs):
            result = module.graph.call_function(operator.getitem, (results, index))
            result.meta = node.meta
            node.replace_all_uses_with(result)
            context.producers[ids[node]] = result
    for node in reversed(run):
        module.graph.erase_node(node)
    return steps
