"""The life of a `GraphModule`: recompilation, and release of the memory that torch would keep."""

from __future__ import annotations

import linecache

from torch import fx


def recompile(module: fx.GraphModule) -> None:
    """Regenerate the module's code from its graph."""
    forget_source(module)
    module.recompile()
    forget_source(module)


def forget_source(module: fx.GraphModule) -> None:
    """Drop the source that torch keeps, for tracebacks, of every graph that it has compiled: a
    build compiles several."""
    name = type(module).forward.__code__.co_filename
    loader = getattr(fx.graph_module, "_loader", None)
    getattr(loader, "eval_cache", {}).pop(name, None)
    linecache.cache.pop(name, None)


def copied_graph(module: fx.GraphModule) -> fx.Graph:
    """A copy of the module's graph, whose nodes have the same names and fake values."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(module.graph, copies)
    graph.output(result)
    for node, copy in copies.items():
        assert node.name == copy.name
    return graph


def finished(module: fx.GraphModule) -> fx.GraphModule:
    """`module`, which no pass will change, without the reference cycle to its graph.

    Reference counting then frees its tensors at once. The cyclic garbage collector, which counts
    objects and not bytes, would free them late.
    """
    module.graph.owning_module = None
    return module
