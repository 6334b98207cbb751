"""Capture a model as a graph of ATen operators on its tensors and one input.

The graph holds all that the model does with tensors, whatever its code consists of: custom layers,
functions, hooks, branches on a shape.
"""

import torch
from torch import Tensor, fx, nn

from ensemble.compiler.graph.analysis import is_random
from ensemble.compiler.graph.eager_dispatch import dispatches, masks_padding
from ensemble.compiler.graph.functionalize import trace_functional
from ensemble.compiler.graph.graph_module import recompile
from ensemble.errors import UnavailableError
from ensemble.machine import randomness
from ensemble.machine.memory import unavailable_on_failure
from ensemble.models import stacking


def capture(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """`graph(*tensors, x)`, and the names of the model's tensors that it reads, in their order.

    Constants that the model's code holds become attributes of the graph.

    Args:
        model: in eval mode.
        example: `(B, C, H, W)`; the graph holds for inputs of its shape, dtype and device.

    Raises:
        UnavailableError: see `trace_functional`; the model depends on values of tensors, mutates
            its own tensors, or draws random numbers.
        ValueError: the model does not return one tensor.
    """
    tensors, stateless = stacking.named_tensors(model), stacking.stateless(model)
    outputs: list[object] = []

    def flat(*arguments: Tensor) -> Tensor:
        state = dict(zip(tensors, arguments[:-1], strict=True))
        result = stateless(state, arguments[-1].clone())  # it may mutate its input
        outputs.append(result)
        return result

    one = stacking.private_copy(model)
    # Call it once first: what its code caches, say a grid, would else hold tensors of the trace.
    result, draws = _called(one, example)
    if draws and _called(one, example)[1]:  # twice: another thread may have drawn
        raise UnavailableError("this model draws random numbers at each call")
    if not isinstance(result, Tensor):
        raise ValueError(f"expected one tensor from each model, got {type(result).__name__}")
    if _has_attention(one) and type(example) is Tensor:
        _check_attention(one, example)
    try:
        # In inference mode a trace decomposes operators that have kernels: bilinear upsampling.
        with torch.inference_mode(False), torch.no_grad():
            module = trace_functional(flat, (*tensors.values(), example))
    finally:
        if outputs and not isinstance(outputs[-1], Tensor):
            found = type(outputs[-1]).__name__
            raise ValueError(f"expected one tensor from each model, got {found}")
    if any(map(is_random, module.graph.nodes)):
        raise UnavailableError("this model draws random numbers at each call")
    *placeholders, _ = module.graph.find_nodes(op="placeholder")
    read = {name: node for name, node in zip(tensors, placeholders, strict=True) if node.users}
    for node in placeholders:
        if not node.users:
            module.graph.erase_node(node)
    recompile(module)
    return module, list(read)


def _has_attention(model: nn.Module) -> bool:
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return any(isinstance(module, kinds) for module in model.modules())


def _check_attention(model: nn.Module, example: Tensor) -> None:
    with torch.inference_mode(False):
        if dispatches(model, example.clone(), masks_padding):
            raise UnavailableError(
                "torch selects the attention kernel of this model by the values of its padding"
                " mask, which a trace does not show"
            )


def _called(model: nn.Module, example: Tensor) -> tuple[object, bool]:
    """The model's result, and whether it drew random numbers: a trace sees only torch's own."""
    is_plain = type(example) is Tensor  # fake tensors draw nothing
    before = randomness.states(example.device) if is_plain else ()
    with (
        unavailable_on_failure("torch cannot trace this model"),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        result = model(example.clone())
    return result, is_plain and randomness.states(example.device) != before
