"""A model as a graph of torch's own operators, ATen, on its tensors and one input.

Whatever a model is made of, layers of its own class, functions, hooks, branches on a shape, this is
all that it does with tensors.
"""

import torch
from torch import Tensor, fx, nn

from ensemble.compiler.graph.functionalize import is_random, recompile, traced
from ensemble.errors import UnavailableError
from ensemble.machine import randomness
from ensemble.machine.memory import unavailable_on_failure
from ensemble.models import stacking


def graph_of(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """`graph(*tensors, x)`, and the names of the model's tensors that it reads, in their order.

    What is no tensor of the model, a constant that its code holds, is an attribute of the graph.

    Args:
        model: in eval mode.
        example: `(B, C, H, W)`; the graph is right for inputs like it.

    Raises:
        UnavailableError: see `traced`; the model's code asks for the values of what it computes, or
            writes over its own tensors, or draws random numbers.
        ValueError: the model gives something else than one tensor.
    """
    tensors, stateless = stacking.named_tensors(model), stacking.stateless(model)
    outputs: list[object] = []

    def flat(*arguments: Tensor) -> Tensor:
        state = dict(zip(tensors, arguments[:-1], strict=True))
        result = stateless(state, arguments[-1].clone())  # it may write over its input
        outputs.append(result)
        return result

    one = stacking.private_copy(model)
    # What its code caches, a grid of coordinates, would else hold tensors of the trace.
    result, draws = _called(one, example)
    if draws and _called(one, example)[1]:  # twice: it may have been another thread
        raise UnavailableError("this model draws random numbers at each call")
    if not isinstance(result, Tensor):
        raise ValueError(f"expected one tensor from each model, found {type(result).__name__}")
    try:
        module = traced(flat, (*tensors.values(), example))
    finally:
        if outputs and not isinstance(outputs[-1], Tensor):
            found = type(outputs[-1]).__name__
            raise ValueError(f"expected one tensor from each model, found {found}")
    if any(map(is_random, module.graph.nodes)):
        raise UnavailableError("this model draws random numbers at each call")
    *placeholders, _ = module.graph.find_nodes(op="placeholder")
    read = {name: node for name, node in zip(tensors, placeholders, strict=True) if node.users}
    for node in placeholders:
        if not node.users:
            module.graph.erase_node(node)
    recompile(module)
    return module, list(read)


def _called(model: nn.Module, example: Tensor) -> tuple[object, bool]:
    """What a model gives, and whether random numbers were drawn: a trace sees only torch's."""
    is_plain = type(example) is Tensor  # fake ones draw nothing
    before = randomness.states(example.device) if is_plain else ()
    with (
        unavailable_on_failure("torch cannot trace this model"),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        result = model(example.clone())
    return result, is_plain and randomness.states(example.device) != before
