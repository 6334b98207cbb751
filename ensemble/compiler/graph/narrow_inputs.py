"""Fill up the channels of narrow intermediate images with zeros.

Kernels read narrow images, as the network's input, in NCHW, but write NHWC, so that a convolution
of a narrow intermediate value would end the program. In NHWC channels fill whole vectors anyway.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.nn import functional

from ensemble.compiler.graph.analysis import value_of
from ensemble.compiler.graph.graph_module import recompile
from ensemble.compiler.graph.rewriter import Rewriter
from ensemble.compiler.operators.conv2d import CONV2D
from ensemble.compiler.operators.gather import GATHER
from ensemble.compiler.planning.vector_layout import is_narrow, padded_to_vectors


def widen_narrow_inputs(module: fx.GraphModule) -> None:
    """For each convolution of few channels on what another operator computed, one of a vector's
    channels."""
    graph, wide = Rewriter(module.graph), dict[fx.Node, fx.Node]()
    for node in module.graph.find_nodes(op="call_function", target=CONV2D):
        x, weight, *rest = node.args
        if not graph.is_images(x) or _is_input(x) or not graph.is_constant(weight):
            continue
        channels, groups = value_of(x).shape[1], rest[-2]
        if not is_narrow(channels, tuple(value_of(weight).shape[2:]), groups):
            continue
        count = padded_to_vectors(channels) - channels
        with graph.before(node):
            if x not in wide:
                wide[x] = _filled(graph, x, count)
            filters = graph.call(_with_zeros, weight, count, like=None)
        filters.meta["val"] = _with_zeros(value_of(weight), count)
        node.args = (wide[x], filters, *rest)
    module.graph.eliminate_dead_code()
    recompile(module)


def _is_input(x: fx.Node) -> bool:
    """Is it the network's input, or that with a border?"""
    return x.op == "placeholder" or (x.target is GATHER and _is_input(x.all_input_nodes[0]))


def _filled(graph: Rewriter, x: fx.Node, count: int) -> fx.Node:
    """x with so many more channels of zeros."""
    known = value_of(x)
    rows, columns = (list(range(length)) for length in known.shape[2:])
    channels = [*range(known.shape[1]), *[-1] * count]
    result = graph.call(GATHER, x, rows, columns, channels, like=x)
    result.meta["val"] = known.new_empty(len(known), len(channels), *known.shape[2:])
    return result


def _with_zeros(weight: Tensor, count: int) -> Tensor:
    """Filters for so many more channels, which they ignore."""
    return functional.pad(weight, (0, 0, 0, 0, 0, count))
