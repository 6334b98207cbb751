"""A model by the operators of `ensemble.ops.conv`, whose vmap rules choose kernels for N models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ensemble.models import stacking
from ensemble.ops import conv
from ensemble.passes.effects import effects
from ensemble.passes.fusing import fuse
from ensemble.passes.tracing import is_features, is_images, replaceable, replaceable_once


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


class _Pool2d(nn.Module):
    """A pooling layer's sizes and flag, as the operators of `ensemble.ops.conv` take them."""

    def __init__(self, original: nn.MaxPool2d | nn.AvgPool2d, flag: bool) -> None:
        super().__init__()
        sizes = (original.kernel_size, original.stride, original.padding)
        self.options = (*map(_y_and_x, sizes), flag)


class MaxPool2d(_Pool2d):
    """A layer as the operator `ensemble::max_pool2d`; the flag: ceil mode."""

    def forward(self, x: Tensor) -> Tensor:
        return conv.max_pool2d(x, *self.options)


class AvgPool2d(_Pool2d):
    """A layer as the operator `ensemble::average_pool2d`; the flag: zeros count."""

    def forward(self, x: Tensor) -> Tensor:
        return conv.average_pool2d(x, *self.options)


class Mean(nn.Module):
    """Adaptive average pooling to one pixel: torch has no vmap rule for that."""

    def forward(self, x: Tensor) -> Tensor:
        return _mean_of_pixels(x)


def _mean_of_pixels(x: Tensor) -> Tensor:
    return x.mean((-2, -1), keepdim=True)


class BatchNorm2d(nn.Module):
    """`original`, which no convolution before it could take, as the operator `ensemble::affine`."""

    def __init__(self, original: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = (self.running_var.to(wide) + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.to(wide)
        shift = -self.running_mean.to(wide) * scale
        shift = shift if self.bias is None else shift + self.bias.to(wide)
        return conv.affine(x, scale, shift)


class Head(nn.Module):
    """Average pooling to one pixel and the linear layer after it, as `ensemble::head`."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        return conv.head(x, self.weight, self.bias)


class Linear(nn.Module):
    """A linear layer on features `(B, C)`, as `ensemble::head` of images of one pixel."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        return conv.head(x.reshape(*x.shape, 1, 1), self.weight, self.bias)


def with_operators(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """`model` by the operators of `ensemble.ops.conv`, its tensors under their own names.

    example: `(B, C, H, W)`. What the operators do not fit, or is more than its call, stays.
    """
    fused = fuse(model, example, lambda layer, _, relu: Conv2d(layer, relu=relu), in_place=False)
    for name, node in replaceable_once(fused, fused.graph).items():
        module = fused.get_submodule(name)
        if type(module) is nn.Linear:
            _take_pooling(fused, node, module)
    for name, nodes in replaceable(fused, fused.graph).items():
        module = fused.get_submodule(name)
        if not all(is_images(node.args[0]) for node in nodes):
            continue
        replacement = _operator_for(module)
        if replacement is not None:
            fused.set_submodule(name, replacement)
    for node in fused.graph.find_nodes(op="call_function", target=functional.adaptive_avg_pool2d):
        if is_images(node.args[0]) and node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs:
            node.target, node.args = _mean_of_pixels, node.args[:1]
    for name, nodes in replaceable(fused, fused.graph).items():
        module = fused.get_submodule(name)
        if type(module) is nn.Linear and all(is_features(node.args[0]) for node in nodes):
            fused.set_submodule(name, Linear(module))
    fused.graph.lint()
    fused.recompile()
    return fused


def _operator_for(module: nn.Module) -> nn.Module | None:
    """The same by an operator of ours, where there is one."""
    if type(module) is nn.MaxPool2d:
        plain = module.dilation in (1, (1, 1)) and not module.return_indices
        return MaxPool2d(module, module.ceil_mode) if plain else None
    if type(module) is nn.AvgPool2d:
        plain = not module.ceil_mode and module.divisor_override is None
        return AvgPool2d(module, module.count_include_pad) if plain else None
    if type(module) is nn.AdaptiveAvgPool2d:
        return Mean() if module.output_size in (1, (1, 1)) else None
    if type(module) is nn.BatchNorm2d:
        plain = not module.training and module.running_mean is not None
        return BatchNorm2d(module) if plain else None
    return None


def _y_and_x(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else [size[0], size[-1]]


def _take_pooling(fused: fx.GraphModule, node: fx.Node, linear: nn.Linear) -> None:
    """Where `linear` reads nothing but a flattened mean over all pixels, make them one."""
    flat = node.args[0]
    assert isinstance(flat, fx.Node)
    plain = flat.target is torch.flatten and flat.args[1:] == (1,) and not flat.kwargs
    pool = flat.args[0] if plain else None
    pools = replaceable(fused, fused.graph)
    if not isinstance(pool, fx.Node) or pool not in pools.get(str(pool.target), ()):
        return
    pooling, images = fused.get_submodule(str(pool.target)), pool.args[0]
    assert isinstance(images, fx.Node)
    if (
        type(pooling) is nn.AdaptiveAvgPool2d
        and pooling.output_size in (1, (1, 1))
        and is_images(images)
        and len(flat.users) == len(pool.users) == 1
        and effects(fused, fresh=node).may_run_at(pool, node, reading=images)
    ):
        node.args = (images,)
        fused.graph.erase_node(flat)
        fused.graph.erase_node(pool)
        fused.set_submodule(str(node.target), Head(linear))


def state_of(
    graph: nn.Module, state: dict[str, Tensor], model: nn.Module, num_models: int
) -> dict[str, Tensor]:
    """The stacked tensors that `graph`, made of `model`, has, by the names that it has them under.

    It lacks those of modules that are never called, may have another of a tied tensor's names, and
    has constants that are the same for all models.
    """
    names = stacking.first_names(model)
    return {
        name: state[names[name]] if name in names else torch.stack([tensor] * num_models)
        for name, tensor in stacking.named_tensors(graph).items()
    }
