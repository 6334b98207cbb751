"""From a vmapped forward to what is left of it at each call.

The forward is traced, so that the operators which the vmap rules chose stand in a graph. What
depends on the models' state alone is computed once, and each run of operators that have kernels
becomes one `Program`.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from ensemble.compiler.graph import functionalize
from ensemble.compiler.graph.functionalize import (
    finished,
    node_of,
    recompile,
    remove_identities,
    traced,
)
from ensemble.compiler.operators import conv, stacked
from ensemble.compiler.planning import kernel_selection
from ensemble.compiler.planning.operation import Kind, Operation
from ensemble.compiler.planning.vector_layout import is_narrow

State = dict[str, Tensor]
Values = dict[fx.Node, Tensor]

# Where a fast kernel differs by more than this from torch's own convolution, the layer is computed
# directly: see `Care`. In ResNets drawn at random Winograd differs by 1e-6 to 4e-6.
LARGEST_ERROR = 1e-5


class Care(Enum):
    """What the error of a fast kernel (Winograd, Strassen) is measured by.

    These algorithms add and subtract inputs before they multiply, so their error is one of the
    loudest inputs, wherever it comes out. That is harmless where all outputs matter alike.
    """

    LAYER = "of a layer's largest output"
    EACH = "of the largest output of each channel, and of each place"
    EXACT = "no fast kernel at all"


_CONV2D = torch.ops.ensemble.packed_conv2d.default
_PACK = torch.ops.ensemble.pack_weight.default


@dataclass(frozen=True)
class Lowered:
    """`forward(x)`, the operations of its programs, and where Winograd was refused, and why.

    looped: the operators that vmap has unrolled over the models.
    """

    forward: fx.GraphModule
    operations: tuple[Operation, ...]
    refused: tuple[str, ...]
    looped: tuple[str, ...] = ()


def lower(
    mapped: Callable[..., Tensor],
    state: State,
    example: Tensor,
    *,
    num_models: int,
    threads: int,
    care: Care = Care.LAYER,
) -> Lowered:
    """`mapped` as a function of x alone, for inputs like `example`.

    Args:
        mapped: `(*state, x) -> logits`, vmapped over N models.
        state: stacked tensors by name, which stay as they are, and are not referred to afterwards.
            Emptied: each is freed once nothing needs it.
        example: `(B, C, H, W)` or `(N, B, C, H, W)`. The errors of fast kernels are measured on it,
            so it should not be the same everywhere.
        num_models: N.
        threads: cores to use.
        care: which errors of fast kernels are too large.

    Raises:
        UnavailableError: it writes over tensors in a way that torch cannot take out.
    """
    names, given = list(state), {_storage(tensor) for tensor in state.values()}
    module = traced(mapped, (*state.values(), example), is_mapped=True)
    _keep_pixels(module.graph)
    remove_identities(module.graph)
    *placeholders, x = module.graph.find_nodes(op="placeholder")
    values = {node: state.pop(name) for node, name in zip(placeholders, names, strict=True)}
    layers = dict(zip(placeholders, names, strict=True))
    values[x] = example
    reached, refused = _run_once(module, values, layers, care)
    operations: list[Operation] = []
    numbers = {node: index for index, node in enumerate(module.graph.nodes)}
    nodes = dict(enumerate(module.graph.nodes))
    trace = kernel_selection.Trace(values, numbers, nodes, num_models)
    for run in _runs(module.graph, reached, trace):
        operations += _make_program(module, run, trace, threads)
    _embed(module, values, given)
    module.graph.lint()
    recompile(module)
    return Lowered(finished(module), tuple(operations), tuple(refused))


def _keep_pixels(graph: fx.Graph) -> None:
    """A mean over all pixels, `(N, B, C)`, as images of one pixel that are then reshaped."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, dims, keep = (*node.args, False)[:3]
        found = node_of(x).meta.get("val")
        if keep or node.kwargs or not isinstance(found, Tensor) or found.dim() != 5:
            continue
        if not kernel_selection.is_of_pixels(dims):
            continue
        mean = node.meta["val"]
        with graph.inserting_after(node):
            flat = graph.call_function(aten.reshape.default, (node, list(mean.shape)))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
        node.args, node.meta["val"] = (x, dims, True), mean[..., None, None]


def _run_once(
    module: fx.GraphModule, values: Values, layers: dict[fx.Node, str], care: Care
) -> tuple[set[fx.Node], list[str]]:
    """Run the graph, refusing kernels where they err; leave in `values` what x does not reach.

    Returns the nodes that x reaches, and the layers where a kernel was refused, with the reason.
    """
    reached, refused = functionalize.reached(module.graph), []
    readers = {node: len(node.users) for node in module.graph.nodes}
    for node in module.graph.nodes:
        if node in values or node.op == "output":
            continue
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif node.target is _CONV2D:
            packing = node_of(node.args[1])
            problem = _make_accurate(node, packing, values, care)
            if problem:
                refused.append(f"{layers.get(_origin(packing), node.name)}: {problem}")
            _run_node(packing, values, readers, reached)
            _run_node(node, values, readers, reached)
        elif node.target is not _PACK or next(iter(node.users)).target is not _CONV2D:
            # but the packing of a convolution runs when that does
            _run_node(node, values, readers, reached)
    for node in reached & values.keys():
        del values[node]
    return reached, refused


def _origin(node: fx.Node) -> fx.Node:
    """The first placeholder that a packed weight was made of, if it was of one."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _run_node(
    node: fx.Node, values: Values, readers: dict[fx.Node, int], reached: set[fx.Node]
) -> None:
    """Compute a node, unless that is done, and drop each value that it was the last to read.

    A constant that a node which x reaches reads is not dropped: every call will read it.
    """
    if node not in values:
        arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*arguments, **options)  # type: ignore[operator]
    for source in node.all_input_nodes:
        if node in reached and source not in reached:
            continue
        readers[source] -= 1
        if not readers[source]:
            del values[source]


def _make_accurate(node: fx.Node, packing: fx.Node, values: Values, care: Care) -> str:
    """Run a convolution that saves multiplications, another way where it errs; say why it does."""
    chosen: Any
    x, _, bias, other, chosen, kernel, *options = node.args
    if not Kind(chosen).attempts:
        return ""
    if care is Care.EXACT:
        _use(Kind.DIRECT, node, packing)
        return ""
    weight, dtype = values[node_of(packing.args[0])].float(), values[node_of(x)].dtype
    inputs: list[Any] = [
        None if operand is None else values[node_of(operand)].float()
        for operand in (x, bias, other)
    ]
    exact = _one_by_one(weight, *inputs, *options)
    problems, kind = [], Kind.DIRECT
    for attempt in Kind(chosen).attempts:
        packed = stacked.pack_weight(weight, attempt)  # these have no groups
        found = stacked.packed_conv2d(inputs[0], packed, *inputs[1:], attempt, kernel, *options)
        error = _error(found, exact, care)
        if error <= LARGEST_ERROR:
            values[packing], values[node] = packed, found.to(dtype)
            kind = attempt
            break
        problems.append(f"{attempt.label} differs by {error:.0e}")
    _use(kind, node, packing)
    return f"{kind.label}, for {' and '.join(problems)}" if problems else ""


def _use(kind: Kind, node: fx.Node, packing: fx.Node) -> None:
    """Let a convolution take this kernel."""
    packing.args = (packing.args[0], kind)
    node.args = (*node.args[:4], kind, *node.args[5:])


def _error(found: Tensor, exact: Tensor, care: Care) -> float:
    """The largest error of any model, `(N, B, K, OH, OW)`, as `care` has it."""
    differences, sizes = (found - exact).abs(), exact.abs()
    groups = ((1, 2, 3, 4),) if care is Care.LAYER else ((1, 3, 4), (2,))

    def largest(dims: tuple[int, ...]) -> Tensor:
        least = torch.finfo(exact.dtype).tiny
        return (differences.amax(dims) / sizes.amax(dims).clamp_min(least)).max()

    return max(float(largest(dims)) for dims in groups)


def _one_by_one(
    weight: Tensor,
    x: Tensor,
    bias: Tensor,
    other: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool,
) -> Tensor:
    """The same by torch's own convolution, model after model."""
    images = x if x.dim() == 5 else [x] * len(weight)
    others = [None] * len(weight) if other is None else other
    return torch.stack(
        [
            conv.plain_conv2d(stride, padding, dilation, groups, relu, *operands)
            for operands in zip(images, weight, bias, others, strict=True)
        ]
    )


Run = dict[fx.Node, list[Operation]]


def _runs(graph: fx.Graph, reached: set[fx.Node], trace: kernel_selection.Trace) -> list[Run]:
    """Nodes that have kernels, with their steps, in runs that nothing else which x reaches
    interrupts; each with an operator of ours."""
    runs: list[Run] = [{}]
    for node in graph.nodes:
        if node not in reached or node.op == "placeholder":
            continue
        found = kernel_selection.steps_of(node, trace)
        if not found or not _goes_on(runs[-1], node):
            runs.append({})
        if found:
            runs[-1][node] = found
    return [run for run in runs if any(node.target in kernel_selection.KERNELS for node in run)]


def _goes_on(run: Run, node: fx.Node) -> bool:
    """May a node be in one program with those of a run? A program has one dtype."""
    first = next(iter(run), node)
    return kernel_selection.dtype_of(first) == kernel_selection.dtype_of(
        node
    ) and not _reads_narrow(node, run)


def _reads_narrow(node: fx.Node, run: Run) -> bool:
    """A convolution of few channels reads them as torch has them, not as a step writes them."""
    if node.target is not _CONV2D or node.args[0] not in run:
        return False
    arguments: tuple[Any, ...] = node.args
    x, *_, kernel, _, _, _, groups, _ = arguments
    return is_narrow(x.meta["val"].shape[-3], tuple(kernel), groups)


def _make_program(
    module: fx.GraphModule, run: Run, trace: kernel_selection.Trace, threads: int
) -> list[Operation]:
    """Replace a run of nodes by one program."""
    from ensemble.compiler.runtime.program import Program

    numbers = trace.numbers
    outputs = [node for node in run if any(user not in run for user in node.users)]
    found = [step for node in run for step in run[node]]
    operations = kernel_selection.with_activations_taken(found, {numbers[node] for node in outputs})
    made = {numbers[node] for node in run}
    read = dict.fromkeys(value for step in operations for value in step.reads)
    inputs = [value for value in read if value not in made]
    first, last = next(iter(run)), next(reversed(run))
    program = Program(
        operations,
        inputs=inputs,
        outputs=[numbers[node] for node in outputs],
        num_models=trace.num_models,
        threads=threads,
        dtype=first.meta["val"].dtype,
    )
    name = f"program_{numbers[first]}"
    module.add_submodule(name, program)
    with module.graph.inserting_before(last):
        results = module.graph.call_module(name, tuple(trace.nodes[value] for value in inputs))
        for index, node in enumerate(outputs):
            result = module.graph.call_function(operator.getitem, (results, index))
            result.meta = node.meta
            node.replace_all_uses_with(result)
            trace.nodes[numbers[node]] = result
    for node in reversed(run):
        module.graph.erase_node(node)
    return operations


def _storage(tensor: Tensor) -> int:
    """What tells memory apart."""
    return tensor.untyped_storage()._cdata


def _embed(module: fx.GraphModule, constants: Values, given: set[int]) -> None:
    """Put the constants that are still read into the module, and remove all else of the state.

    given: the memory of the models, which may change it later: of that a copy is put there.
    """
    x = module.graph.find_nodes(op="placeholder")[-1]
    for node in reversed(module.graph.nodes):
        if node.users and node in constants:
            name = f"constant_{node.name}"
            constant = constants[node]
            is_given = node.op == "get_attr" or _storage(constant) in given
            module.register_buffer(name, constant.clone() if is_given else constant)
            with module.graph.inserting_before(x):
                node.replace_all_uses_with(module.graph.get_attr(name))
        if not node.users and node is not x and node.op != "output":
            module.graph.erase_node(node)
