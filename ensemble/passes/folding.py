"""Batch norm folded into the convolution before it: the same function, fewer passes over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ensemble.errors import UnavailableError
from ensemble.models import stacking
from ensemble.ops import serial
from ensemble.passes.tracing import replaceable_once, traced


def folded(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies of `models` without the batch norms that follow a convolution, in channels-last.

    They stay modules of their own class (each folded norm becomes an Identity), so they stack, and
    are slices of one stack as those of `stacking.allocate` are. The fold is computed in float64.

    Raises:
        UnavailableError: torch.fx cannot trace the models.
        ValueError: models that `stacking.check_alike` refuses.
    """
    stacking.check_alike(models)
    foldable, template = _without_norms(models[0])
    stacking.set_tensors(
        template,
        {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in stacking.named_tensors(template).items()
            if tensor.dim() == 4
        },
    )
    device = next(models[0].parameters()).device
    copies = stacking.allocate(template, len(models), device=device)
    for model, copy in zip(models, copies, strict=True):
        source, target = stacking.named_tensors(model), stacking.named_tensors(copy)
        for name in target.keys() & source.keys():
            target[name].copy_(source[name])
        for conv_name, norm_name in foldable:
            weight, bias = _fold(model.get_submodule(conv_name), model.get_submodule(norm_name))
            target[f"{conv_name}.weight"].copy_(weight)
            target[f"{conv_name}.bias"].copy_(bias)
    return copies


def _without_norms(model: nn.Module) -> tuple[list[tuple[str, str]], nn.Module]:
    """The convolutions and norms to fold, and the skeleton of `model` with these norms gone.

    The model's own code runs on what is left. Where it would take another way than before, for it
    looks at its modules (`isinstance(layer, nn.BatchNorm2d)`, `conv.bias is None`), none is folded.
    """
    graph = traced(stacking.skeleton(model)).graph
    foldable, template = _foldable(model, graph), stacking.skeleton(model)
    for conv_name, norm_name in foldable:
        conv = template.get_submodule(conv_name)
        if conv.bias is None:
            empty = torch.empty(conv.out_channels, dtype=conv.weight.dtype, device="meta")
            conv.bias = nn.Parameter(empty, requires_grad=False)
        template.set_submodule(norm_name, nn.Identity().eval())
    try:
        same = _listed(traced(template).graph) == _listed(graph)
    except UnavailableError:
        same = False
    return (foldable, template) if same else ([], stacking.skeleton(model))


def _listed(graph: fx.Graph) -> list[tuple[str, ...]]:
    return [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs))
        for node in graph.nodes
    ]


def channels_last(x: Tensor) -> Tensor:
    """`x`, `(B, 3, H, W)` or `(N, B, 3, H, W)`, with its channels last in memory."""
    return serial.contiguous(x.movedim(-3, -1)).movedim(-1, -3)


def _foldable(model: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """The names of each convolution and the batch norm that alone reads its result."""
    calls = replaceable_once(model, graph)
    foldable = []
    for name, node in calls.items():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        conv = str(source.target)
        if (
            _has_statistics(model.get_submodule(name))
            and source is calls.get(conv)
            and type(model.get_submodule(conv)) is nn.Conv2d
            and len(source.users) == 1
        ):
            foldable.append((conv, name))
    return foldable


def _has_statistics(module: nn.Module) -> bool:
    """A batch norm whose result is a linear function of its input, the same for every batch."""
    return (
        type(module) is nn.BatchNorm2d
        and module.running_mean is not None
        and module.running_var is not None
    )


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    of_conv, of_norm = stacking.named_tensors(conv), stacking.named_tensors(norm)
    weight = of_conv["weight"].double()
    bias = of_conv["bias"].double() if "bias" in of_conv else None
    mean, variance = of_norm["running_mean"].double(), of_norm["running_var"].double()
    scale = of_norm["weight"].double() if "weight" in of_norm else None
    shift = of_norm["bias"].double() if "bias" in of_norm else None
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
