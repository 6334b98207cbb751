"""Convolutions with weights packed once, and relu and residual fused into them: oneDNN on the CPU.

An eager convolution puts its weights into oneDNN's own blocked order at every call: more than the
arithmetic itself in the last stages of a ResNet. Compiling with frozen weights packs them once too,
at 3 to 4 s a model; here it costs milliseconds. The operators are those that Inductor calls; they
are private to torch, so `pack` asks whether they are there.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ensemble.errors import UnavailableError
from ensemble.passes.fusing import fuse


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
        layer = (x, self.weight, self.bias, *self.geometry)
        if other is None:
            result = torch.ops.mkldnn._convolution_pointwise(*layer, "none", [], "")
        else:
            result = torch.ops.mkldnn._convolution_pointwise_.binary(
                other, *layer, "add", 1.0, None, [], ""
            )
        # Not oneDNN's, which makes 0 of NaN: a broken image or weight would give an answer.
        return result.relu_() if self.relu else result


def pack(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """`model` with its convolutions packed for inputs like `example` and fused with what follows.

    Raises:
        UnavailableError: not the CPU, no oneDNN or not its operators, a dtype that it lacks, or a
            model that torch.fx cannot trace.
    """
    reason = why_not(example.device.type, example.dtype)
    if reason:
        raise UnavailableError(reason)
    return fuse(
        model,
        example,
        lambda conv, shape, relu: PackedConv2d(conv, shape, relu=relu),
        in_place=True,
    )


def why_not(device: str, dtype: torch.dtype) -> str:
    """Why oneDNN's packed convolution cannot run on this machine; nothing where it can."""
    if device != "cpu":
        return f"packed weights are oneDNN's, for the CPU, not {device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return "this torch does not have oneDNN's packed convolution"
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype != torch.float32 and (dtype not in supported or not supported[dtype]()):
        return f"oneDNN does not compute in {dtype} on this CPU"
    return ""
