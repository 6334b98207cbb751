"""Batch norm folded into the convolution before it: the same function, fewer passes over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensemble import stacking
from ensemble.errors import UnavailableError


def folded(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies of `models` without the batch norms that follow a convolution, in channels-last.

    They stay modules of their own class (each folded norm becomes an Identity), so they stack, and
    are slices of one stack as those of `stacking.allocate` are. The fold is computed in float64.

    Raises:
        UnavailableError: torch.fx cannot trace the models.
    """
    pairs = _foldable(models[0])
    template = stacking.skeleton(models[0])
    for conv_name, norm_name in pairs:
        conv = template.get_submodule(conv_name)
        if conv.bias is None:
            empty = torch.empty(conv.out_channels, dtype=conv.weight.dtype, device="meta")
            conv.bias = nn.Parameter(empty, requires_grad=False)
        _replace(template, norm_name, nn.Identity())
    for name, tensor in stacking.named_tensors(template).items():
        if tensor.dim() == 4:
            stacking.set_tensor(
                template, name, tensor.contiguous(memory_format=torch.channels_last)
            )
    device = next(models[0].parameters()).device
    copies = stacking.allocate(template, len(models), device=device)
    for model, copy in zip(models, copies, strict=True):
        own, target = stacking.named_tensors(model), stacking.named_tensors(copy)
        for name in target.keys() & own.keys():
            target[name].copy_(own[name])
        for conv_name, norm_name in pairs:
            weight, bias = _fold(model.get_submodule(conv_name), model.get_submodule(norm_name))
            target[f"{conv_name}.weight"].copy_(weight)
            target[f"{conv_name}.bias"].copy_(bias)
    return copies


def traced(model: nn.Module) -> fx.GraphModule:
    """`model` as a graph of its modules; raises UnavailableError where torch.fx cannot trace it."""
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # a tracer runs the model's own code, which may raise anything
        raise UnavailableError(f"torch.fx cannot trace this model: {error}") from error


def channels_last(x: Tensor) -> Tensor:
    """`x`, `(B, 3, H, W)` or `(N, B, 3, H, W)`, with its channels last in memory."""
    images = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    return images.view(x.shape) if x.dim() == 4 else images.unflatten(0, x.shape[:-3])


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """The names of each convolution and the batch norm that alone reads its result."""
    graph = traced(stacking.skeleton(model)).graph
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = [node.target for node in calls]
    pairs = []
    for node in calls:
        source = node.args[0]
        if (
            isinstance(modules[node.target], nn.BatchNorm2d)
            and isinstance(source, fx.Node)
            and source.op == "call_module"
            and isinstance(modules[str(source.target)], nn.Conv2d)
            and len(source.users) == 1
            and once.count(source.target) == once.count(node.target) == 1
        ):
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    own, other = stacking.named_tensors(conv), stacking.named_tensors(norm)
    weight, bias = own["weight"].double(), own["bias"].double() if "bias" in own else None
    mean, variance = other["running_mean"].double(), other["running_var"].double()
    scale = other["weight"].double() if "weight" in other else None
    shift = other["bias"].double() if "bias" in other else None
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)
