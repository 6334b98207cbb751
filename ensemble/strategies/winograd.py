"""The vmapped forward with operators of its own: kernels for N models, weights packed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ensemble.folding import folded
from ensemble.fusing import fuse
from ensemble.ops import conv, lower
from ensemble.stacking import skeleton, stacked_state, stateless

if TYPE_CHECKING:
    from torch import fx

    from ensemble.strategies import Forward


def vmap(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """One vmapped forward over the stacked state, lowered to what depends on the image."""
    lowered = lower_vmap(models, example)
    kinds = Counter(operation.kind.label for operation in lowered.operations)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
    note = f"kernels: {counts}" if counts else "kernels: none, all by torch's own"

    def forward(x: Tensor) -> Tensor:
        return lowered.forward(x)

    forward.note = "; ".join((note, *lowered.refused))  # type: ignore[attr-defined]
    return forward


def compiled(models: Sequence[nn.Module], example: Tensor) -> Forward:
    """The same through `torch.compile`: for where the operators are made of torch's own."""
    forward = torch.compile(lower_vmap(models, example).forward, fullgraph=True, dynamic=False)
    return lambda x: forward(x)


def lower_vmap(models: Sequence[nn.Module], example: Tensor) -> lower.Lowered:
    """The vmapped forward of the folded models by the operators of `ensemble.ops`, lowered."""
    copies = folded(models)
    state, template = stacked_state(copies), skeleton(copies[0])
    del copies  # the state is freed tensor by tensor, as it is packed
    mapped = torch.vmap(
        stateless(with_operators(template)), in_dims=(0, 0 if example.dim() == 5 else None)
    )
    return lower.lower(mapped, state, example, threads=torch.get_num_threads())


class Conv2d(nn.Module):
    """`conv`, what is added to it and its relu, as the operator `ensemble::conv2d`."""

    def __init__(self, original: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        self.options = (
            list(original.stride),
            list(original.padding),
            list(original.dilation),
            original.groups,
            relu,
        )

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return conv.conv2d(x, self.weight, self.bias, other, *self.options)


class MaxPool2d(nn.Module):
    """`original` as the operator `ensemble::max_pool2d`."""

    def __init__(self, original: nn.MaxPool2d) -> None:
        super().__init__()
        options = (original.kernel_size, original.stride, original.padding)
        self.options = tuple([own, own] if isinstance(own, int) else list(own) for own in options)

    def forward(self, x: Tensor) -> Tensor:
        return conv.max_pool2d(x, *self.options)


class Head(nn.Module):
    """Average pooling to one pixel and the linear layer after it, as `ensemble::head`."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        return conv.head(x, self.weight, self.bias)


def with_operators(template: nn.Module) -> fx.GraphModule:
    """`template` by the operators of `ensemble.ops.conv`, its tensors under their own names."""
    fused = fuse(template, lambda name, own, relu: Conv2d(own, relu=relu), in_place=False)
    for name, module in list(fused.named_modules()):
        if type(module) is nn.MaxPool2d and module.dilation == 1 and not module.ceil_mode:
            fused.set_submodule(name, MaxPool2d(module))
        elif type(module) is nn.Linear:
            _take_pooling(fused, name, module)
    fused.recompile()
    return fused


def _take_pooling(fused: fx.GraphModule, name: str, linear: nn.Linear) -> None:
    """Where `linear` reads nothing but a flattened mean over all pixels, make them one."""
    for node in fused.graph.find_nodes(op="call_module", target=name):
        flat = node.args[0]
        pool = flat.args[0] if flat.target is torch.flatten and flat.args[1:] == (1,) else None
        if pool is None or pool.op != "call_module" or len(flat.users) + len(pool.users) > 2:
            return
        own = fused.get_submodule(pool.target)
        if type(own) is nn.AdaptiveAvgPool2d and own.output_size in (1, (1, 1)):
            node.args = (pool.args[0],)
            fused.graph.erase_node(flat)
            fused.graph.erase_node(pool)
            fused.set_submodule(name, Head(linear))
