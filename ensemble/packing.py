"""Convolutions with weights packed once, and relu and residual fused into them: oneDNN on the CPU.

An eager convolution puts its weights into oneDNN's own blocked order at every call: more than the
arithmetic itself in the last stages of a ResNet. Compiling with frozen weights packs them once too,
at 3 to 4 s a model; here it costs milliseconds. The operators are those that Inductor calls; they
are private to torch, so `pack` asks whether they are there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemble.errors import UnavailableError
from ensemble.fusing import fuse, is_plain


class PackedConv2d(nn.Module):
    """`conv` on channels-last images, with `relu` after it; called with `other`, its sum with it.

    The sum is formed in the memory of `other`.
    """

    def __init__(self, conv: nn.Conv2d, input_size: torch.Size, *, relu: bool) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks input_size
        weight = conv.weight.detach().to_mkldnn()
        self.weight = reorder(weight, *self.geometry, list(input_size))
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.relu = relu

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        after = "relu" if self.relu else "none"
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, after, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            other,
            x,
            self.weight,
            self.bias,
            *self.geometry,
            "add",
            1.0,
            after if self.relu else None,
            [],
            "",
        )


def pack(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """`model` with its convolutions packed for inputs like `example` and fused with what follows.

    Raises:
        UnavailableError: not the CPU, no oneDNN or not its operators, a dtype that it lacks, or a
            model that torch.fx cannot trace.
    """
    _check(example)
    sizes = _input_sizes(model, example)
    return fuse(
        model, lambda name, conv, relu: PackedConv2d(conv, sizes[name], relu=relu), in_place=True
    )


def _input_sizes(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """The input size of each convolution that can be packed, from one run of the model."""
    sizes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: sizes.update({name: arguments[0].shape})

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if is_plain(module)
    ]
    model(example)
    for hook in hooks:
        hook.remove()
    return sizes


def _check(example: Tensor) -> None:
    if example.device.type != "cpu":
        raise UnavailableError(f"packed weights are oneDNN's, for the CPU, not {example.device}")
    if not torch.backends.mkldnn.is_available():
        raise UnavailableError("this torch was built without oneDNN")
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        raise UnavailableError("this torch does not have oneDNN's packed convolution")
    support = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if example.dtype in support and not support[example.dtype]():
        raise UnavailableError(f"oneDNN does not compute in {example.dtype} on this CPU")
