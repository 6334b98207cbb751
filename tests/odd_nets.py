"""Small random nets of anything but plain convolutions, from descriptions that print as Python.

Arithmetic before the first layer, reshapes, attention, broadcasting, constants, data-dependent
control flow, and outputs of many forms. As in `tests.nets`, a step that does not fit the values
before it is dropped: whatever hypothesis shrinks is still a net, and a failing one can be pasted
into a test.
"""

import io
import itertools
import math
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.nets import Call, Described, Values

MOST_ELEMENTS = 3000  # of a value of one image
WIDTH = 6  # features of most layers

_dlpack: Any = torch.utils.dlpack

One = Callable[[Tensor], Any]
Maker = Callable[[Tensor], Callable[[Tensor], Any]]  # from a value like those that it will be given


class Image(Tensor):
    """A tensor of its own class, as torchvision's are."""


class Holding(nn.Module):
    """`function(self, x)` with random tensors of these shapes: parameters, buffers, attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Any], hold: str, **shapes: Any) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            tensor = torch.randn(tuple(shape))
            if hold == "parameter":
                self.register_parameter(name, nn.Parameter(tensor))
            elif hold == "buffer":
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Having(nn.Module):
    """`function(self, x)` with submodules or other objects as attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **things: Any) -> None:
        super().__init__()
        self.function = function
        for name, thing in things.items():
            setattr(self, name, thing)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _owning(function: Callable[[Any, Tensor], Any], **shapes: Any) -> nn.Module:
    return Holding(function, "parameter", **shapes)


def _buffered(function: Callable[[Any, Tensor], Any], **shapes: Any) -> nn.Module:
    return Holding(function, "buffer", **shapes)


def _constant(function: Callable[[Any, Tensor], Any], **shapes: Any) -> nn.Module:
    return Holding(function, "attribute", **shapes)


def _set(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


def _data(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    write(x.data)
    return x


# Preprocessing. Where a name ends in _ it writes to its input.
PREPARING: dict[str, One] = {
    "times": lambda x: x * 2 - 1,
    "bytes": lambda x: (x * 64 + 128).clamp(0, 255) / 255,
    "bytes_": lambda x: x.mul_(64).add_(128).clamp_(0, 255).div_(255),
    "as bytes": lambda x: (x * 64 + 128).clamp(0, 255).to(torch.uint8).to(x.dtype) / 255,
    "round": lambda x: (x * 8).round() / 8,
    "round_": lambda x: x.mul_(8).round_().div_(8),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_": lambda x: x.clamp_(min=0.1),
    "of the batch": lambda x: (x - x.mean()) / (x.std() + 0.1),
    "of the batch_": lambda x: x.sub_(x.mean()).div_(x.std() + 0.1),
    "of an image": lambda x: x - x.mean((1, 2, 3), keepdim=True),
    "of a channel": lambda x: x / x.flatten(2).norm(dim=2)[..., None, None].clamp_min(0.1),
    "largest": lambda x: x / x.amax(),
    "data_": lambda x: _data(x, lambda data: data.mul_(0.5)),
    "data less_": lambda x: _data(x, lambda data: data.sub_(0.25).div_(0.5)),
    "data fill_": lambda x: _data(x, lambda data: data[:, 0].fill_(0.5)),
    "detach_": lambda x: x.detach().add_(1),
    "BGR": lambda x: x[:, [2, 1, 0]],
    "flip": lambda x: x.flip(1),
    "mirror": lambda x: x.flip(-1),
    "average of both": lambda x: (x + x.flip(-1)) / 2,
    "border_": lambda x: _set(x, (..., 0), 0.5),
    "negative_": lambda x: _set(x, x < 0, 0.0),
    "row_": lambda x: _set(x, (slice(None), slice(None), 1), x[:, :, 0] * 2),
    "masked": lambda x: x.masked_fill(x > 1, 1.0),
    "masked_": lambda x: x.masked_fill_(x > 1, 1.0),
    "nan to num": lambda x: x.nan_to_num(0.0, 1.0, -1.0),
    "to double and back": lambda x: x.double().mul(0.5).to(x.dtype),
    "copy_": lambda x: x.copy_(x * 0.5),
    "gray": lambda x: x.mean(1, keepdim=True),
    "gray again": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "transposed_": lambda x: x.transpose(2, 3).mul_(2).transpose(2, 3),
    "part_": lambda x: (x[:, 1:].neg_(), x)[1],
    "sigmoid_": lambda x: x.sigmoid_(),
}
# Preprocessing of uint8 images.
BYTES: dict[str, One] = {
    "float": lambda x: x.float() / 255,
    "float_": lambda x: x.float().div_(255).sub_(0.5),
    "divide": lambda x: x / 255,
    "double": lambda x: x.double().sub(128).div(64).float(),
    "to": lambda x: x.to(torch.float32) * 0.01,
    "type": lambda x: x.type(torch.float32).mul(0.01),
    "shift": lambda x: x >> 2,
    "low bits": lambda x: x & 15,
    "wrap": lambda x: x + 200,
    "wrap_": lambda x: x.add_(200),
    "inverse": lambda x: 255 - x,
    "threshold": lambda x: (x > 128).float(),
    "signed": lambda x: x.to(torch.int16) - 128,
    "levels": lambda x: functional.one_hot((x >> 6).long(), 4).float(),
    "BGR": lambda x: x[:, [2, 1, 0]],
    "flip": lambda x: x.flip(-1),
    "clamp_": lambda x: x.clamp_(10, 200),
    "as it is": lambda x: x,
}


def _patches(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


SHAPING: dict[str, One] = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(x.shape[0], x.shape[1], -1),
    "rows": lambda x: x.reshape(-1, x.shape[-1]),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "channels first": lambda x: x.permute(0, 3, 1, 2),
    "contiguous": lambda x: x.contiguous(),
    "movedim": lambda x: x.movedim(-1, 1),
    "swap": lambda x: x.transpose(-1, -2),
    "swap first": lambda x: x.transpose(0, 1),
    "mT": lambda x: x.mT,
    "patches": _patches,
    "unfold": lambda x: functional.unfold(x, 2, stride=2),
    "unfold tokens": lambda x: functional.unfold(x, 3, padding=1).transpose(1, 2),
    "windows": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2),
    "pixel shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
    "unflatten": lambda x: x.unflatten(1, (-1, 3)),
    "squeeze": lambda x: x.squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "as images": lambda x: x[:, :, None, None],
    "half": lambda x: x.chunk(2, 1)[0],
    "other half": lambda x: x.chunk(2, -1)[-1],
    "first": lambda x: x[:, 0],
    "last": lambda x: x[..., -1],
    "every other": lambda x: x[:, ::2],
    "narrow": lambda x: x.narrow(-1, 1, 2),
    "roll": lambda x: x.roll(1, -1),
    "roll batch": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(-1),
    "flip batch": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "pad": lambda x: functional.pad(x, (1, 1), value=0.5),
    "reflect": lambda x: functional.pad(x, (1, 1, 1, 1), "reflect"),
    "larger": lambda x: functional.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: functional.interpolate(x, size=(5, 7), mode="bilinear"),
    "smaller": lambda x: functional.adaptive_avg_pool2d(x, 2),
    "max pool": lambda x: functional.max_pool2d(x, 2),
    "max pool 1d": lambda x: functional.max_pool1d(x, 2),
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1),
    "tril": lambda x: x.tril(),
    "rot90": lambda x: x.rot90(1, (-2, -1)),
    "batch as channels": lambda x: x.reshape(1, -1, *x.shape[2:]).reshape(x.shape),
    "take": lambda x: x[:, torch.arange(x.shape[1], device=x.device) % 2],
    "pixels": lambda x: torch.stack([row.sum(-1) for row in x.unbind(2)], 1),
    "each image": lambda x: torch.stack([image * 2 for image in x]),
    "each image by index": lambda x: torch.cat([x[i : i + 1].exp() for i in range(len(x))]),
    "expanded": lambda x: x.mean(1, keepdim=True).expand(-1, 4, *[-1] * (x.dim() - 2)),
    "channel shuffle": lambda x: functional.channel_shuffle(x, 3),
    "fold": lambda x: functional.fold(functional.unfold(x, 2), x.shape[2:], 2),
    "einsum": lambda x: torch.einsum("bc...->bc", x),
    "reversed axes": lambda x: x.permute(*range(x.dim())[::-1]),
    "reversed view": lambda x: x.view(len(x), *x.shape[:0:-1]),
    "reshape of transposed": lambda x: x.transpose(1, -1).reshape(len(x), -1),
    "view of copied": lambda x: x.transpose(1, -1).contiguous().view(len(x), -1),
    "flatten and unflatten": lambda x: x.flatten(0, 1).unflatten(0, (len(x), -1)),
    "all": lambda x: x.reshape(-1),
    "ravel": lambda x: x.ravel()[None],
    "view as": lambda x: x.reshape(-1).view_as(x),
    "two images": lambda x: x.reshape(2, -1),
    "batch last": lambda x: x.flatten(1).T,
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, *[-1] * (x.dim() - 1)),
    "expand as": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "broadcast to": lambda x: x.amax(1, keepdim=True).broadcast_to(x.shape),
    "expand batch": lambda x: x[:1].expand(x.shape),
    "expand in front": lambda x: x.expand(2, *x.shape).sum(0),
    "repeat images": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "repeat last": lambda x: x.repeat(*[1] * (x.dim() - 1), 2),
    "tiled": lambda x: x.tile(2),
    "split": lambda x: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1),
    "tensor split": lambda x: x.tensor_split(2, -1)[0],
    "unbind": lambda x: torch.stack(x.unbind(1), -1),
    "index select": lambda x: x.index_select(-1, torch.tensor([1, 0, 1], device=x.device)),
    "by list": lambda x: x[:, [0, 0, -1]],
    "by two lists": lambda x: x[:, [0, 1], [1, 0]],
    "by far lists": lambda x: x[[0], :, [1]],
    "by booleans": lambda x: x[:, [True] + [False] * (x.shape[1] - 1)],
    "new axis": lambda x: x[..., None, :],
    "from the end": lambda x: x[:, -2:, ..., :-1],
    "every third": lambda x: x[..., 1::3],
    "select scatter": lambda x: x.select_scatter(x.select(1, 0) * 2, 1, 0),
    "slice scatter": lambda x: x.slice_scatter(x[..., -2:] * 2, -1, -2),
    "diagonal matrix": lambda x: torch.diag_embed(x),
    "trace": lambda x: torch.einsum("...ii->...", x[..., : x.shape[-2], : x.shape[-2]]),
    "as integers": lambda x: x.view(torch.int32).view(torch.float32),
    "channels last in memory": lambda x: x.contiguous(memory_format=torch.channels_last),
    "kron": lambda x: torch.kron(x, x.new_ones(1, 2)),
    "tensordot": lambda x: torch.tensordot(x, x.flatten(1), dims=([0], [0])),
    "hstack": lambda x: torch.hstack([x, x * 2]),
    "dstack": lambda x: torch.dstack([x, x * 2]),
    "at least 3": lambda x: torch.atleast_3d(x),
    "swap and back": lambda x: (x.transpose(1, -1) * 2).transpose(1, -1),
    "batch in columns": lambda x: x.flatten(1).mT.reshape(x.shape),
    "no pixels": lambda x: torch.cat([x, x[..., :0]], -1),
    "unfold 1d": lambda x: x.unfold(-1, 2, 1),
}
NUMBERS: dict[str, One] = {
    "relu": torch.relu,
    "relu_": lambda x: x.relu_(),
    "gelu": functional.gelu,
    "exp": lambda x: (-x.abs()).exp(),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(1),
    "softmax over the batch": lambda x: x.softmax(0),
    "mean": lambda x: x.mean(-1),
    "mean over pixels": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(1).values,
    "std": lambda x: x.std(-1),
    "var mean": lambda x: torch.var_mean(x, 1)[1],
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: x.norm(dim=-1),
    "unit": lambda x: functional.normalize(x, dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1).values,
    "sort over channels": lambda x: x.sort(1, descending=True)[0],
    "topk": lambda x: x.topk(2, -1).values,
    "kth": lambda x: x.kthvalue(2, -1).values,
    "median": lambda x: x.median(-1).values,
    "one hot": lambda x: functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype) + x,
    "largest of itself": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "sign": lambda x: x.sign() * x.abs().add(0.1).sqrt(),
    "add_": lambda x: x.add_(1),
    "mul_ part": lambda x: (x[..., :1].mul_(2), x)[1],
    "zero_ part": lambda x: (x.select(1, 0).zero_(), x)[1],
    "set part_": lambda x: _set(x, (slice(None), 0), 1.0),
    "data_": lambda x: _data(x, lambda data: data.add_(0.5)),
    "gram": lambda x: x.flatten(2) @ x.flatten(2).mT / x[0, 0].numel(),
    "outer": lambda x: x[:, :, None] + x[:, None, :],
    "distances": lambda x: torch.cdist(x, x + 1),
    "matrix product": lambda x: torch.bmm(x, x.mT),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "fft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x + 1) ** 2).sum(-1),
    "attention with itself": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "own norm": lambda x: functional.layer_norm(x, x.shape[1:]),
    "unit batch": lambda x: (x - x.mean(0)) / (x.std(0, correction=0) + 0.5),
    "layers": lambda x: functional.instance_norm(x),
    "dropout that is off": lambda x: functional.dropout(x, training=False),
    "local": lambda x: functional.local_response_norm(x, 2),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "out=": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "empty like": lambda x: torch.empty_like(x).copy_(x),
    "bucketize": lambda x: torch.bucketize(x, x.new_tensor([-1.0, 0.0, 1.0])).to(x.dtype) + x,
    "nan": lambda x: torch.where(x > 1, x.new_tensor(math.nan), x),
    "infinite": lambda x: x.masked_fill(x > 1, math.inf),
}
# Tensors that a model makes itself, and no parameters.
CONSTANTS: dict[str, One] = {
    "arange": lambda x: x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype),
    "bare arange": lambda x: x + torch.arange(x.shape[-1]) / 4,
    "bare linspace": lambda x: x * torch.linspace(0, 1, x.shape[-1]),
    "linspace": lambda x: (
        torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)[:, None] + x[..., None]
    ),
    "coordinates": lambda x: torch.cat([x, _grid(x).expand(x.shape[0], -1, -1, -1)], 1),
    "zeros beside": lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], 1),
    "new zeros beside": lambda x: torch.cat([x.new_zeros(len(x), 1, *x.shape[2:]), x], 1),
    "ones beside": lambda x: torch.cat([x, x.new_ones(1).expand(*x.shape[:-1], 1)], -1),
    "filled": lambda x: _filled(x),
    "new tensor": lambda x: x * x.new_tensor([0.5] * x.shape[-1]),
    "tensor": lambda x: x + torch.tensor(0.5, dtype=x.dtype, device=x.device),
    "bare tensor": lambda x: x + torch.tensor([1, 2]).sum(),
    "bare zeros": lambda x: x + torch.zeros(x.shape[-1]),
    "causal": lambda x: (
        (x[..., None] * x[..., None, :])
        .masked_fill(
            ~torch.ones(x.shape[-1], x.shape[-1], device=x.device, dtype=torch.bool).tril(),
            -math.inf,
        )
        .softmax(-1)
    ),
    "eye": lambda x: x @ torch.eye(x.shape[-1], device=x.device, dtype=x.dtype),
    "full like": lambda x: torch.full_like(x, 0.5) * x + torch.ones_like(x),
    "numpy": lambda x: x * torch.from_numpy(np.linspace(0.5, 1, x.shape[-1])).to(x),
    "only its shape": lambda x: torch.ones_like(x),
    "only zeros": lambda x: torch.zeros_like(x),
    "nothing of it": lambda x: x.new_full((x.shape[0], 4), 0.5),
    "batch size": lambda x: x / len(x),
    "position": lambda x: x + x.new_ones(len(x)).cumsum(0).reshape(-1, *[1] * (x.dim() - 1)),
    "grid sample": lambda x: functional.grid_sample(
        x, _grid(x).movedim(0, -1).flip(-1).expand(len(x), -1, -1, -1) * 0.9, align_corners=True
    ),
    "rows and columns": lambda x: (
        x + torch.arange(x.shape[-2])[:, None] * 0.25 + torch.arange(x.shape[-1]) * 0.5
    ),
    "for each image": lambda x: x * (torch.arange(len(x)) + 1).view(-1, *[1] * (x.dim() - 1)),
    "one more axis": lambda x: x + x.new_ones([1] * (x.dim() + 1)),
    "axis in front": lambda x: (x[None] + x.new_zeros(3, *[1] * x.dim())).mean(0),
    "constant first": lambda x: torch.tensor(2.0) * x - torch.ones(x.shape[1:]) / x.new_tensor(3),
    "constant minus": lambda x: torch.ones(x.shape[-1]) - x,
    "power": lambda x: torch.tensor(2.0) ** x.clamp(-3, 3),
    "where constant": lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, 0.5),
    "where constant first": lambda x: torch.where(
        torch.ones(x.shape[1:]).cumsum(0) > 1, torch.zeros(()), x
    ),
    "maximum": lambda x: torch.maximum(x, torch.linspace(-1, 1, x.shape[-1]).to(x.dtype)),
    "outer": lambda x: x[..., None] * torch.arange(3.0).to(x.dtype),
    "broadcast tensors": lambda x: sum(torch.broadcast_tensors(x, x.new_ones(x.shape[-1]))),
    "product with constants": lambda x: x @ torch.ones(x.shape[-1], 3, dtype=x.dtype).tril(),
    "constants product": lambda x: torch.ones(3, x.shape[-2], dtype=x.dtype) @ x,
    "blur": lambda x: functional.conv2d(
        x, x.new_tensor([[1.0, 2], [3, 4]]).expand(x.shape[1], 1, 2, 2), groups=x.shape[1]
    ),
    "sum of channels": lambda x: functional.conv2d(x, x.new_ones(1, x.shape[1], 1, 1)),
    "linear by constants": lambda x: functional.linear(x, x.new_ones(4, x.shape[-1]).triu()),
    "conv of constants": lambda x: (
        x + functional.conv2d(x.new_ones(1, 1, 5, 5), x.new_ones(1, 1, 5, 5)).squeeze()
    ),
    "stack beside": lambda x: torch.stack([x, torch.zeros_like(x)], -1),
    "pad constants": lambda x: x + functional.pad(x.new_zeros(x.shape[-1] - 2), (1, 1), value=1.0),
    "scatter": lambda x: x.new_zeros(x.shape).scatter(-1, x.argmax(-1, keepdim=True), 1.0) + x,
    "index put": lambda x: x.index_put((torch.arange(len(x)), torch.tensor(0)), x.new_tensor(0.5)),
    "numpy array": lambda x: x + torch.tensor(np.ones(x.shape[-1], np.float32)).to(x.dtype),
    "cat constants": lambda x: torch.cat(
        [torch.zeros(len(x), 1, *x.shape[2:], dtype=x.dtype), x], 1
    ),
    "eye like": lambda x: x + torch.eye(*x.shape[-2:], dtype=x.dtype),
}


def _grid(x: Tensor) -> Tensor:
    """`(2, H, W)`."""
    rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def _filled(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])
    y[:, 1:] = x
    return y


PAIRS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - 0.5 * b,
    "*": lambda a, b: a * b,
    "+=_": lambda a, b: a.add_(b),
    "*=_": lambda a, b: a.mul_(b),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "cat last": lambda a, b: torch.cat([a, b], -1),
    "stack": lambda a, b: torch.stack([a, b], 1),
    "outer": lambda a, b: a[..., :, None] + b[..., None, :],
    "product": lambda a, b: a @ b.mT,
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "maximum": torch.maximum,
    "copy_": lambda a, b: a.copy_(b),
    "part_": lambda a, b: _set(a, (slice(None), slice(0, 1)), b[:, :1]),
    "gate": lambda a, b: a * b.mean(-1, keepdim=True).sigmoid(),
    "index add": lambda a, b: a.index_add(1, torch.zeros(b.shape[1], device=b.device).int(), b),
    "attention": lambda a, b: functional.scaled_dot_product_attention(a, b, b),
    "expand": lambda a, b: a + b.flatten(1).mean(1).reshape(-1, *[1] * (a.dim() - 1)),
    "dynamic": lambda a, b: functional.conv2d(a, b[:1, : a.shape[1]]),
    "+ mean": lambda a, b: a + b.mean(-1, keepdim=True),
    "+ channel": lambda a, b: a + b[:, :1],
    "+ first image": lambda a, b: a + b[:1],
    "- image": lambda a, b: a - b[0],
    "* row": lambda a, b: a * b[..., :1, :],
    "+ new axes": lambda a, b: a + b[..., None, None],
    "new axes +": lambda a, b: b.unsqueeze(-1) + a,
    "product with one": lambda a, b: a @ b[0].mT,
    "baddbmm": lambda a, b: torch.baddbmm(a @ b.mT, a, b.mT, alpha=0.5),
    "einsum": lambda a, b: torch.einsum("b...i,b...j->b...ij", a, b),
    "cat images": lambda a, b: torch.cat([a, b])[: len(a)],
    "where channel": lambda a, b: torch.where(a[:, :1] > 0, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, a.sigmoid()),
    "gather": lambda a, b: a.gather(-1, b.argmax(-1, keepdim=True)),
    "along": lambda a, b: torch.take_along_dim(a, b.argsort(-1), -1),
    "scatter add": lambda a, b: a.scatter_add(-1, b.argmax(-1, keepdim=True), b),
    "rows": lambda a, b: a[torch.arange(len(a)), b.flatten(1).argmax(1) % a.shape[1]],
    "kernel for each": lambda a, b: functional.conv2d(
        a.reshape(1, -1, *a.shape[2:]),
        b[:, : a.shape[1], :2, :2].flatten(0, 1)[:, None],
        groups=a.shape[0] * a.shape[1],
    ),
    "bias": lambda a, b: functional.conv2d(a, a.new_ones(2, a.shape[1], 1, 1), b.flatten()[:2]),
    "adaptive norm": lambda a, b: functional.layer_norm(
        a, a.shape[-1:], b.flatten()[: a.shape[-1]]
    ),
    "broadcast": lambda a, b: torch.add(*torch.broadcast_tensors(a, b)),
    "swap_": lambda a, b: (a.add_(b), b.sub_(a), b)[2],
    "set column_": lambda a, b: _set(a, (..., 0), b[..., -1]),
    "out=": lambda a, b: torch.mul(a, b, out=a),
}


def _linear(x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[-1], WIDTH)


def _tied(x: Tensor) -> nn.Module:
    first, second = nn.Linear(x.shape[-1], x.shape[-1]), nn.Linear(x.shape[-1], x.shape[-1])
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _normalize(x: Tensor, shape: Sequence[int], how: str) -> nn.Module:
    ways: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "": lambda self, x: (x - self.mean) / (self.std.abs() + 0.5),
        "_": lambda self, x: x.sub_(self.mean).div_(self.std.abs() + 0.5),
        "data_": lambda self, x: _data(x, lambda data: data.sub_(self.mean).mul_(self.std)),
    }
    return Holding(ways[how], "buffer", mean=shape, std=shape)


def _attention(x: Tensor, **options: Any) -> nn.Module:
    attention = nn.MultiheadAttention(x.shape[-1], 2 - x.shape[-1] % 2, batch_first=True, **options)
    return Having(
        lambda self, x: self.attention(x, x, x, need_weights=False)[0], attention=attention
    )


def _encoder(x: Tensor) -> nn.Module:
    width = x.shape[-1]
    return nn.TransformerEncoderLayer(width, 2 - width % 2, 2 * WIDTH, batch_first=True)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _NewSquare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _weight_norm(x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still in use
        return nn.utils.weight_norm(_linear(x))


def _hooked(x: Tensor) -> nn.Module:
    layer = _linear(x)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def _conv2d(x: Tensor, groups: int = 1, **options: Any) -> nn.Module:
    """groups 0: depthwise."""
    _needs(x, 4)
    channels, groups = x.shape[1], groups or x.shape[1]
    return nn.Conv2d(channels, WIDTH // groups * groups or groups, groups=groups, **options)


def _conv1d(x: Tensor) -> nn.Module:
    _needs(x, 3)
    return nn.Conv1d(x.shape[1], WIDTH, 3, padding=1)


def _conv3d(x: Tensor) -> nn.Module:
    _needs(x, 4)
    return Having(lambda self, x: self.conv(x[:, None])[:, 0], conv=nn.Conv3d(1, 1, 3, padding=1))


def _transposed(x: Tensor) -> nn.Module:
    _needs(x, 4)
    return nn.ConvTranspose2d(x.shape[1], 3, 2, stride=2)


def _needs(x: Tensor, dimensions: int) -> None:
    if x.dim() != dimensions:
        raise ValueError(f"{x.dim()} dimensions")


def _normed(x: Tensor) -> nn.Module:
    _needs(x, 4)
    conv = nn.Conv2d(x.shape[1], WIDTH, 3, padding=1, bias=False)
    return nn.Sequential(conv, _statistics(nn.BatchNorm2d(WIDTH)))


def _statistics(norm: Any) -> Any:
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    return norm


def _recurrent(x: Tensor) -> nn.Module:
    _needs(x, 3)
    gru = nn.GRU(x.shape[-1], 4, batch_first=True)
    return Having(lambda self, x: self.gru(x)[0], gru=gru)


def _scripted(x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still in use
        module: Any = torch.jit.script(_linear(x))
        return module


def _traced(x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still in use
        module: Any = torch.jit.trace(_linear(x), x, check_trace=False)
        return module


def _squeeze_excite(x: Tensor) -> nn.Module:
    _needs(x, 4)
    channels = x.shape[1]
    gate = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.SiLU(), nn.Conv2d(2, channels, 1))
    return Having(lambda self, x: x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid(), gate=gate)


def _standardized(x: Tensor) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std() + 0.1)
        return functional.conv2d(x, weight, self.conv.bias, padding=1)

    return Having(forward, conv=_conv2d(x, kernel_size=3))


def _window_attention(x: Tensor) -> nn.Module:
    """Swin's relative position bias: a table of parameters, read by a buffer of indices."""
    _needs(x, 3)
    tokens = x.shape[1]
    places = torch.arange(tokens)
    index = (places[:, None] - places[None] + tokens - 1).flatten()

    def forward(self: Any, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(tokens, tokens, -1).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return (attention @ v).transpose(1, 2).reshape(batch, tokens, -1)

    return Having(
        forward,
        qkv=nn.Linear(x.shape[-1], 3 * 4),
        table=nn.Parameter(torch.randn(2 * tokens - 1, 2)),
        index=nn.Buffer(index),
    )


def _per_class(x: Tensor) -> nn.Module:
    linears = nn.ModuleDict({"b": nn.Linear(x.shape[-1], 2), "a": nn.Linear(x.shape[-1], 3)})
    return Having(lambda self, x: torch.cat([f(x) for f in self.heads.values()], -1), heads=linears)


LAYERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "linear": _linear,
    "linear without bias": lambda x: nn.Linear(x.shape[-1], WIDTH, bias=False),
    "conv": lambda x: _conv2d(x, kernel_size=3, padding=1),
    "conv 1x1": lambda x: _conv2d(x, kernel_size=1),
    "patch embedding": lambda x: _conv2d(x, kernel_size=2, stride=2),
    "depthwise": lambda x: _conv2d(x, 0, kernel_size=3, padding=1, bias=False),
    "grouped": lambda x: _conv2d(x, 3, kernel_size=3, stride=2),
    "dilated": lambda x: _conv2d(x, kernel_size=2, dilation=2, padding_mode="reflect", padding=1),
    "conv and norm": _normed,
    "conv1d": _conv1d,
    "conv3d": _conv3d,
    "transposed conv": _transposed,
    "normalize": lambda x: _normalize(x, (1, x.shape[1], 1, 1), ""),
    "normalize by channel": lambda x: _normalize(x, (x.shape[1], 1, 1), ""),
    "normalize_": lambda x: _normalize(x, (1, x.shape[1], 1, 1), "_"),
    "normalize by number_": lambda x: _normalize(x, (), "_"),
    "normalize data_": lambda x: _normalize(x, (x.shape[1], 1, 1), "data_"),
    "layer norm": lambda x: nn.LayerNorm(x.shape[-1]),
    "layer norm of all": lambda x: nn.LayerNorm(x.shape[1:]),
    "group norm": lambda x: nn.GroupNorm(1 if x.shape[1] % 2 else 2, x.shape[1]),
    "instance norm": lambda x: nn.InstanceNorm2d(x.shape[1], affine=True),
    "rms norm": lambda x: nn.RMSNorm(x.shape[-1]),
    "batch norm": lambda x: _statistics(nn.BatchNorm2d(x.shape[1])),
    "batch norm 1d": lambda x: _statistics(nn.BatchNorm1d(x.shape[1])),
    "batch norm of the batch": lambda x: nn.BatchNorm2d(x.shape[1], track_running_stats=False),
    "prelu": lambda x: nn.PReLU(x.shape[1]),
    "attention": _attention,
    "attention with bias": lambda x: _attention(x, add_bias_kv=True),
    "encoder": _encoder,
    "recurrent": _recurrent,
    "tied": _tied,
    "twice": lambda x: Having(
        lambda self, x: self.layer(self.layer(x).relu()),
        layer=nn.Linear(x.shape[-1], x.shape[-1]),
    ),
    "weight norm": lambda x: nn.utils.parametrizations.weight_norm(_linear(x)),
    "old weight norm": _weight_norm,
    "spectral norm": lambda x: nn.utils.parametrizations.spectral_norm(_linear(x)),
    "orthogonal": lambda x: nn.utils.parametrizations.orthogonal(_linear(x)),
    "hooked": _hooked,
    "scripted": _scripted,
    "traced": _traced,
    "heads": _per_class,
    "squeeze and excite": _squeeze_excite,
    "weight standardization": _standardized,
    "window attention": _window_attention,
    "transposed conv, grouped": lambda x: nn.ConvTranspose2d(
        x.shape[1], x.shape[1], 3, groups=x.shape[1], padding=1
    ),
    "batch norm without weights": lambda x: _statistics(nn.BatchNorm2d(x.shape[1], affine=False)),
    "instance norm with statistics": lambda x: _statistics(
        nn.InstanceNorm2d(x.shape[1], affine=True, track_running_stats=True)
    ),
    "mix tokens": lambda x: Having(
        lambda self, x: x + self.layer(x.mT).mT, layer=nn.Linear(x.shape[-2], x.shape[-2])
    ),
    "positions": lambda x: Having(
        lambda self, x: x + self.table(torch.arange(x.shape[1])),
        table=nn.Embedding(x.shape[1], x.shape[-1]),
    ),
    "layer scale": lambda x: _owning(
        lambda self, x: x + self.gamma * x.tanh(), gamma=(x.shape[1], *[1] * (x.dim() - 2))
    ),
    "embedding": lambda x: Having(
        lambda self, x: self.table(x.argmax(-1)), table=nn.Embedding(x.shape[-1], WIDTH)
    ),
    "old function": lambda x: Having(lambda self, x: _Square.apply(x)),
    "new function": lambda x: Having(lambda self, x: _NewSquare.apply(x)),
    "checkpoint": lambda x: Having(
        lambda self, x: torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False),
        layer=_linear(x),
    ),
    "functional call": lambda x: Having(
        lambda self, x: torch.func.functional_call(
            self.layer, {k: v * 2 for k, v in self.layer.named_parameters()}, (x,)
        ),
        layer=_linear(x),
    ),
    "inner vmap": lambda x: Having(lambda self, x: torch.vmap(self.layer)(x), layer=_linear(x)),
    "each image": lambda x: Having(
        lambda self, x: torch.stack([self.layer(image) for image in x]), layer=_linear(x)
    ),
    "shift": lambda x: _owning(lambda self, x: x + self.shift, shift=x.shape[-1:]),
    "shift buffer": lambda x: _buffered(lambda self, x: x + self.shift, shift=x.shape[1:]),
    "shift constant": lambda x: _constant(lambda self, x: x + self.shift, shift=x.shape[1:]),
    "scalar": lambda x: _owning(lambda self, x: x * self.scale, scale=()),
    "one": lambda x: _owning(lambda self, x: x + self.one, one=(1,) * x.dim()),
    "position": lambda x: _owning(lambda self, x: x + self.position, position=(1, *x.shape[1:])),
    "class token": lambda x: _owning(
        lambda self, x: torch.cat([self.token.expand(len(x), -1, -1), x], 1),
        token=(1, 1, x.shape[-1]),
    ),
    "class token repeated": lambda x: _owning(
        lambda self, x: torch.cat([x, self.token.repeat(len(x), 1, 1)], 1),
        token=(1, 1, x.shape[-1]),
    ),
    "plane": lambda x: _owning(
        lambda self, x: torch.cat([x, self.plane.expand(len(x), -1, -1, -1)], 1),
        plane=(1, *x.shape[2:]),
    ),
    "constant plane": lambda x: _constant(
        lambda self, x: torch.cat([x, self.plane.expand(len(x), -1, -1, -1)], 1),
        plane=(1, *x.shape[2:]),
    ),
    "weight": lambda x: _owning(lambda self, x: x @ self.weight, weight=(x.shape[-1], WIDTH)),
    "weight of itself": lambda x: _owning(
        lambda self, x: functional.linear(x, self.weight @ self.weight.T / WIDTH),
        weight=(x.shape[-1], x.shape[-1]),
    ),
    "weight written": lambda x: _owning(
        lambda self, x: x @ (self.weight * 1).add_(1), weight=(x.shape[-1], WIDTH)
    ),
    "masked weight": lambda x: _owning(
        lambda self, x: x @ torch.where(self.weight > 0, self.weight, 0.0),
        weight=(x.shape[-1], WIDTH),
    ),
    "weight for each image": lambda x: _owning(
        lambda self, x: torch.bmm(x, self.weight.expand(len(x), -1, -1)),
        weight=(x.shape[-1], WIDTH),
    ),
    "part of the weight": lambda x: _owning(
        lambda self, x: x @ self.weight.mT[::2].contiguous().mT, weight=(x.shape[-1], WIDTH)
    ),
    "weight first": lambda x: _owning(lambda self, x: self.weight @ x, weight=(3, x.shape[-2])),
    "weight minus": lambda x: _owning(
        lambda self, x: self.weight - x.unsqueeze(-1), weight=(1, x.shape[-1], 2)
    ),
    "matrix of a vector": lambda x: _owning(
        lambda self, x: x @ (self.vector[:, None] * self.vector), vector=x.shape[-1:]
    ),
    "softmax of weights": lambda x: _owning(
        lambda self, x: (x.unsqueeze(-1) * self.mix.softmax(-1)).sum(-1), mix=(3,)
    ),
    "conv of a vector": lambda x: _owning(
        lambda self, x: functional.conv2d(
            x, self.taps.outer(self.taps).expand(x.shape[1], 1, 3, 3), groups=x.shape[1]
        ),
        taps=(3,),
    ),
    "written buffer": lambda x: _buffered(
        lambda self, x: x + self.shift.clone().clamp_(-1, 1), shift=x.shape[-1:]
    ),
    "outer sum": lambda x: _owning(lambda self, x: x[..., None] + self.row, row=(WIDTH,)),
    "queries": lambda x: _owning(
        lambda self, x: functional.scaled_dot_product_attention(
            self.queries.expand(len(x), -1, -1), x, x
        ),
        queries=(2, x.shape[-1]),
    ),
    "bilinear": lambda x: Having(
        lambda self, x: self.layer(x, x), layer=nn.Bilinear(x.shape[-1], x.shape[-1], 3)
    ),
    "parameters": lambda x: Having(
        lambda self, x: x * self.scales[0] + self.scales[1],
        scales=nn.ParameterList([torch.randn(x.shape[-1]), torch.randn(())]),
    ),
    "indices": lambda x: Having(
        lambda self, x: x[:, self.order],
        order=nn.Buffer(torch.arange(x.shape[1]).flip(0)),
    ),
    "mask": lambda x: Having(
        lambda self, x: x.masked_fill(self.mask, 0.5),
        mask=nn.Buffer(torch.arange(x.shape[-1]) % 2 == 0),
    ),
    "count": lambda x: Having(lambda self, x: x / self.count, count=nn.Buffer(torch.tensor(3))),
    "lookup": lambda x: Having(
        lambda self, x: self.table[x.long() % 7],
        table=nn.Buffer(torch.randint(0, 256, (7,), dtype=torch.uint8)),
    ),
    "integer weight": lambda x: Having(
        lambda self, x: x.long() @ self.weight,
        weight=nn.Buffer(torch.randint(-8, 8, (x.shape[-1], 5))),
    ),
    "byte weight": lambda x: Having(
        lambda self, x: x * self.weight,
        weight=nn.Buffer(torch.randint(0, 4, x.shape[-1:], dtype=torch.uint8)),
    ),
    "list of tensors": lambda x: Having(
        lambda self, x: x * self.tensors[0] + self.tensors[1],
        tensors=[torch.tensor(0.5), torch.ones(x.shape[-1])],
    ),
}
# What no strategy but the loop may be able to run. Their attributes cannot always be copied.
ODD: dict[str, Maker] = {
    "branch": lambda x: lambda x: x * 2 if x.sum() > 0 else x - 1,
    "branch on a weight": lambda x: _owning(
        lambda self, x: x * self.weight if self.weight > 0 else x + self.weight, weight=()
    ),
    "item": lambda x: lambda x: x / (x.abs().max().item() + 1),
    "item of a weight": lambda x: _owning(lambda self, x: x * self.weight.item(), weight=()),
    "float": lambda x: lambda x: x * float(x.mean()),
    "index": lambda x: lambda x: x * [2, 3][int(x.sum() > 0)],
    "equal": lambda x: lambda x: x * 2 if torch.equal(x, x.flip(0)) else x + 1,
    "all close": lambda x: lambda x: x * 2 if torch.allclose(x, x.abs()) else x + 1,
    "any": lambda x: lambda x: x.nan_to_num() if x.isnan().any() else x * 2,
    "loop": lambda x: lambda x: _halved(x),
    "size by value": lambda x: lambda x: x[..., : 1 + int(x.flatten()[0] > 0)],
    "for numbers": lambda x: lambda x: x + sum(float(number) for number in x.flatten()[:3]),
    "in a thread": lambda x: lambda x: _in_thread(x),
    "selected": lambda x: lambda x: x + x[x > 0].sum(),
    "nonzero": lambda x: lambda x: x + len(x.flatten().nonzero()),
    "size of a mask": lambda x: lambda x: x[:, torch.arange(x.shape[1], device=x.device) % 2 == 0],
    "assertion": lambda x: lambda x: _asserted(x),
    "dropout": lambda x: partial(functional.dropout, p=0.5, training=True),
    "noise": lambda x: lambda x: x + torch.randn_like(x),
    "random": lambda x: lambda x: x * torch.rand(x.shape, device=x.device, dtype=x.dtype),
    "Python's random": lambda x: lambda x: x * random.random(),
    "NumPy's random": lambda x: lambda x: x + float(np.random.rand()),
    "permuted": lambda x: lambda x: x + torch.randperm(x.shape[-1], device=x.device),
    "bernoulli": lambda x: lambda x: x * torch.bernoulli(x.sigmoid()),
    "own generator": lambda x: Having(
        lambda self, x: x + torch.rand(x.shape, generator=self.generator, dtype=x.dtype),
        generator=torch.Generator().manual_seed(0),
    ),
    "lock": lambda x: Having(lambda self, x: _under(self.lock, x), lock=threading.Lock()),
    "generator": lambda x: Having(
        lambda self, x: x + 1, generator=torch.Generator(), numbers=(i for i in range(3))
    ),
    "counter": lambda x: Having(lambda self, x: x + 1, counter=itertools.count(1)),
    "lambda": lambda x: Having(lambda self, x: self.times(x), times=lambda x: x * 3),
    "number of its own": lambda x: Having(
        lambda self, x: x * self.factor, factor=float(torch.randn(()))
    ),
    "array of its own": lambda x: Having(
        lambda self, x: x * float(self.factor[0]), factor=torch.randn(1).numpy()
    ),
    "closure of its own": lambda x: _closure(),
    "default of its own": lambda x: _defaulted(float(torch.randn(()))),
    "constant of its own": lambda x: _constant(lambda self, x: x * self.factor, factor=()),
    "set of its own": lambda x: Having(
        lambda self, x: x * max(self.names), names={1, 2 + int(torch.randint(3, ()))}
    ),
    "slots of its own": lambda x: Having(lambda self, x: x * self.slots.factor, slots=_Slots()),
    "kept": lambda x: Having(_keep, last=None),
    "kept in a list": lambda x: Having(lambda self, x: (self.kept.append(x), x + 1)[1], kept=[]),
    "counted": lambda x: Having(
        lambda self, x: (self.count.add_(1), x + 1)[1], count=nn.Buffer(torch.tensor(0))
    ),
    "memory": lambda x: lambda x: x.as_strided(x.shape[::-1], x.stride()[::-1]) * 1,
    "strides": lambda x: lambda x: x * 2 if x.is_contiguous() else x * 3,
    "grad mode": lambda x: lambda x: x * 2 if torch.is_grad_enabled() else x * 3,
    "gradient": lambda x: lambda x: _gradient(x),
    "type": lambda x: lambda x: x * (2 if type(x) is Tensor else 3),
    "deepcopy": lambda x: lambda x: x.__deepcopy__({}) * 2,
    "threads": lambda x: lambda x: x * torch.get_num_threads() / torch.get_num_threads(),
    "inference mode": lambda x: lambda x: _inference(x),
    "autocast": lambda x: Having(_autocast, layer=_linear(x)),
    "compiled for shapes": lambda x: lambda x: x * (2 if x.shape[0] > 1 else 3),
    "state dict": lambda x: Having(
        lambda self, x: x * self.state_dict()["scale"].sum(), scale=nn.Parameter(torch.randn(2))
    ),
    "names": lambda x: Having(
        lambda self, x: x * len(list(self.parameters())), layer=nn.Linear(2, 2)
    ),
    "layout of its weight": lambda x: Having(
        lambda self, x: x * self.scale.stride(0), scale=nn.Parameter(torch.randn(4, 4)[:, :2])
    ),
    "sets its weight": lambda x: Having(_sets_weight, layer=_linear(x)),
}
# Code that reads the memory of a tensor, of which a trace knows nothing.
READING: dict[str, Maker] = {
    "numpy": lambda x: lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "numpy_": lambda x: lambda x: (np.negative(x.numpy(), out=x.numpy()), x)[1],
    "numpy of a copy_": lambda x: lambda x: _written_by_numpy(x * 2),
    "detached numpy": lambda x: lambda x: x * float(x.detach().cpu().numpy().mean()),
    "asarray": lambda x: lambda x: torch.as_tensor(np.asarray(x)) * 2,
    "array": lambda x: lambda x: torch.from_numpy(np.array(x)) - 1,
    "ufunc": lambda x: lambda x: torch.as_tensor(np.sin(x)),
    "tensor of an array": lambda x: lambda x: torch.tensor(x.numpy()) * 2,
    "from_dlpack": lambda x: lambda x: _dlpack.from_dlpack(x) * 2,
    "to_dlpack": lambda x: lambda x: _dlpack.from_dlpack(_dlpack.to_dlpack(x)) * 2,
    "NumPy's dlpack": lambda x: lambda x: torch.from_numpy(np.from_dlpack(x) * 2),
    "tolist": lambda x: lambda x: x + x.new_tensor(x.flatten(1).mean(1).tolist()).sum(),
    "data_ptr": lambda x: lambda x: x + x.data_ptr() * 0,
    "storage": lambda x: lambda x: x + x.untyped_storage().nbytes() * 0,
    "apply_": lambda x: lambda x: x.apply_(lambda number: number * 2),
    "map_": lambda x: lambda x: x.map_(x + 1, lambda a, b: a + b),
    "pickle": lambda x: lambda x: pickle.loads(pickle.dumps(x)) * 2,
    "save": lambda x: lambda x: _saved(x) * 2,
    "numpy of a weight": lambda x: _owning(
        lambda self, x: x * torch.from_numpy(self.weight.detach().numpy() * 2),
        weight=x.shape[-1:],
    ),
}


class _Slots:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = float(torch.randn(()))


def _defaulted(number: float) -> One:
    def times(x: Tensor, factor: float = number) -> Tensor:
        return x * factor

    return times


def _closure() -> One:
    factor = float(torch.randn(()))
    return lambda x: x * factor


def _halved(x: Tensor) -> Tensor:
    for _ in range(8):
        if x.abs().max() < 1:
            break
        x = x / 2
    return x


def _in_thread(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x * 2).result()


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 2


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.layer(x).to(x.dtype)


def _sets_weight(self: Any, x: Tensor) -> Tensor:
    before = self.layer.weight
    self.layer.weight = nn.Parameter(before * 2, requires_grad=False)
    try:
        return self.layer(x)
    finally:
        self.layer.weight = before


def _written_by_numpy(x: Tensor) -> Tensor:
    array = x.numpy()
    array[...] = array + 1
    return x


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def _keep(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return x * 2


def _under(lock: Any, x: Tensor) -> Tensor:
    with lock:
        return x + 1


def _asserted(x: Tensor) -> Tensor:
    assert bool((x < 1e30).all() | x.isnan().any())
    return x + 1


def _gradient(x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        y = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((y**2).sum(), y)
        return found


# Outputs. Those of NO_TENSOR are not one tensor.
ENDS: dict[str, Maker] = {
    "as it is": lambda x: lambda x: x,
    "logits": lambda x: nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)),
    "argmax": lambda x: lambda x: x.argmax(-1),
    "argmax of all": lambda x: lambda x: x.argmax(),
    "boolean": lambda x: lambda x: x > 0,
    "integers": lambda x: lambda x: (x * 4).to(torch.int32),
    "bytes": lambda x: lambda x: (x.sigmoid() * 9).to(torch.uint8),
    "mean": lambda x: lambda x: x.mean(),
    "sum of images": lambda x: lambda x: x.sum(0),
    "of values": lambda x: lambda x: x[x > 0],
    "masked": lambda x: lambda x: x.masked_fill(x < 0, -math.inf),
    "masked for some": lambda x: _buffered(
        lambda self, x: x.masked_fill(self.mask > 0, -math.inf), mask=x.shape[-1:]
    ),
    "no classes": lambda x: lambda x: x.flatten(1)[:, :0],
    "transposed": lambda x: lambda x: x.transpose(0, -1),
    "expanded": lambda x: lambda x: x.flatten(1).mean(1, keepdim=True).expand(-1, 7),
    "viewed": lambda x: lambda x: x[..., ::2],
    "flipped": lambda x: lambda x: x.flip(-1),
    "its view": lambda x: lambda x: x.view(x.shape),
    "detached": lambda x: lambda x: x.detach(),
    "double": lambda x: lambda x: x.double(),
    "half": lambda x: lambda x: x.bfloat16(),
    "complex": lambda x: lambda x: torch.fft.fft(x),
    "conjugate": lambda x: lambda x: torch.fft.fft(x).conj(),
    "imaginary": lambda x: lambda x: torch.fft.fft(x).conj().imag,
    "a parameter": lambda x: _owning(lambda self, x: self.weight, weight=(2, 3)),
    "a parameter for each": lambda x: _owning(
        lambda self, x: self.weight.expand(len(x), -1), weight=(1, 5)
    ),
    "a buffer": lambda x: _buffered(lambda self, x: self.weight, weight=(4,)),
    "a constant": lambda x: _constant(lambda self, x: self.weight, weight=(4,)),
    "a number": lambda x: _owning(lambda self, x: self.weight * 2, weight=()),
    "ones": lambda x: lambda x: x.new_ones(len(x), 3),
    "zeros": lambda x: lambda x: torch.zeros_like(x),
    "batch size": lambda x: lambda x: torch.tensor(len(x)),
    "classes": lambda x: lambda x: torch.arange(5, device=x.device),
    "parameter": lambda x: lambda x: nn.Parameter(x, requires_grad=False),
    "topk": lambda x: lambda x: x.topk(2, -1).indices,
    "sorted": lambda x: lambda x: x.sort(-1).indices,
    "any": lambda x: lambda x: (x > 1).any(),
    "sizes": lambda x: lambda x: x.new_tensor(x.shape).long(),
    "subclass": lambda x: lambda x: x.as_subclass(Image),
    "small integers": lambda x: lambda x: x.clamp(-9, 9).to(torch.int8),
    "float16": lambda x: lambda x: x.clamp(-9, 9).half(),
    "channels last": lambda x: lambda x: x.contiguous(memory_format=torch.channels_last),
    "first image": lambda x: lambda x: x[0],
    "new axis": lambda x: lambda x: x[None],
    "constant": lambda x: lambda x: torch.tensor(1.5),
    "no images": lambda x: lambda x: x[:0],
    "negative view": lambda x: lambda x: torch._neg_view(x),
    "inference": lambda x: lambda x: _inference(x),
    "column": lambda x: lambda x: x.flatten(1)[:, :1],
    "part of a copy": lambda x: lambda x: (x * 2).flatten()[1:],
}
NO_TENSOR: dict[str, Maker] = {
    "dict": lambda x: lambda x: {"out": x},
    "tuple": lambda x: lambda x: (x, x),
    "list of one": lambda x: lambda x: [x],
    "none": lambda x: lambda x: None,
    "python number": lambda x: lambda x: 1.5,
    "named": lambda x: lambda x: x.max(-1),
    "array": lambda x: lambda x: np.zeros(3),
    "sparse": lambda x: lambda x: x.to_sparse(),
    "compressed": lambda x: lambda x: x.flatten(1).to_sparse_csr(),
    "quantized": lambda x: lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: lambda x: torch.nested.nested_tensor(list(x)),
}


@dataclass(frozen=True, repr=False)
class Step(Described):
    """An entry of one of the tables above, applied to the value `source` steps before the last
    one; entries of PAIRS take the value `other` steps before the last one as well."""

    table: str = "LAYERS"
    how: str = "linear"
    source: int = 0
    other: int = 1

    def layer(self, values: Values) -> nn.Module:
        index = len(values) - 1 - self.source % len(values)
        if self.table == "PAIRS":
            return Call(PAIRS[self.how], index, len(values) - 1 - self.other % len(values))
        if self.table in PLAIN:
            return Call(PLAIN[self.table][self.how], index)
        return Call(MADE[self.table][self.how](values[index]), index)


PLAIN = {
    "PREPARING": PREPARING,
    "BYTES": BYTES,
    "SHAPING": SHAPING,
    "NUMBERS": NUMBERS,
    "CONSTANTS": CONSTANTS,
}
MADE: dict[str, dict[str, Any]] = {
    "LAYERS": LAYERS,
    "ODD": ODD,
    "READING": READING,
    "ENDS": ENDS,
    "NO_TENSOR": NO_TENSOR,
}


# Steps of ODD that draw random numbers at each call.
TORCH_RANDOM = ("dropout", "noise", "random", "permuted", "bernoulli")
OTHER_RANDOM = ("own generator", "Python's random", "NumPy's random")


@dataclass(frozen=True, repr=False)
class Net(Described):
    """Steps on images `(batch, channels, *size)` of this dtype; the last value is the output.

    A net of uint8 images has no floating parameters or buffers.
    """

    steps: tuple[Step, ...] = ()
    batch: int = 2
    channels: int = 3
    size: tuple[int, int] = (4, 4)
    dtype: str = "float32"

    @property
    def sets_itself(self) -> bool:
        """Does it change itself for the time of a call, which no two threads may do at once?"""
        return any(step.how in ("sets its weight", "functional call") for step in self.steps)

    @property
    def attends(self) -> bool:
        """Does it call `scaled_dot_product_attention`?"""
        return any("attention" in step.how or step.how == "encoder" for step in self.steps)

    @property
    def is_bytes(self) -> bool:
        return self.dtype == "uint8"


class OddNet(nn.Module):
    """The module of a description, made of those of its steps that fit."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        values: Values = [images(net, seed=0)]
        layers: list[nn.Module] = []
        for step in fitting(net):
            layer = _layer(step, values, net)
            values.append(layer([value.clone() for value in values]))
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for layer in self.layers:
            values.append(layer(values))
        return values[-1]


def images(net: Net, *, seed: int, models: int | None = None) -> Tensor:
    """Random images of a net, `(batch, channels, H, W)`, or a batch for each of so many models."""
    each = () if models is None else (models,)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((*each, net.batch, net.channels, *net.size), generator=generator)
    return of_dtype(x, net)


def of_dtype(x: Tensor, net: Net) -> Tensor:
    """Random numbers as images in the dtype of a net."""
    if net.is_bytes:
        return (x.nan_to_num(0, 2, -2) * 64 + 128).clamp(0, 255).to(torch.uint8)
    return x.to(getattr(torch, net.dtype))


def draws_numbers(net: Net) -> bool:
    """Does it draw random numbers, whether or not its output shows them?"""
    return any(
        step.table == "ODD" and step.how in TORCH_RANDOM + OTHER_RANDOM for step in fitting(net)
    )


@lru_cache(64)
def fitting(net: Net) -> tuple[Step, ...]:
    """The steps of a net that fit the values before them; none after one that gives no tensor."""
    values: Values = [images(net, seed=0)]
    steps: list[Step] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for step in net.steps:
            try:
                layer = _layer(step, values, net)
                value = layer([value.clone() for value in values])
            except Exception:  # torch raises all sorts of errors for sizes that do not fit
                continue
            if isinstance(value, Tensor) and value.numel() > MOST_ELEMENTS * max(2, net.batch):
                continue
            steps.append(step)
            values.append(value)
            if not isinstance(value, Tensor) or step.table == "NO_TENSOR":
                break
    return tuple(steps)


def _layer(step: Step, values: Values, net: Net) -> nn.Module:
    """Raises ValueError where a net of this dtype cannot have such a layer."""
    layer = step.layer(values).eval()
    if net.is_bytes:
        if any(tensor.is_floating_point() for tensor in [*layer.parameters(), *layer.buffers()]):
            raise ValueError("a floating tensor in a net of uint8 images")
        return layer
    return layer.to(getattr(torch, net.dtype))


def models(net: Net, count: int, *, same: bool = False) -> list[nn.Module]:
    """Eval-mode models of a net, each with its own weights; `same`: with equal ones."""
    made: list[nn.Module] = []
    with torch.random.fork_rng(), torch.no_grad():
        for seed in range(count):
            torch.manual_seed(0 if same else seed)
            made.append(OddNet(net).eval().requires_grad_(False))
    return made


def draw(rng: random.Random) -> Net:
    """A net of a few steps. About one in ten is of uint8 images."""
    dtype = rng.choice(["float32"] * 13 + ["float64", "bfloat16"] * 2 + ["uint8"] * 2)
    before = [_step(rng, "PREPARING") for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    if dtype == "uint8":
        before = [_step(rng, "BYTES") for _ in range(rng.choice([1, 1, 2, 3]))]
    middle = [_step(rng, rng.choice(_MIDDLE)) for _ in range(rng.choice([1, 2, 3, 4, 5, 7, 9]))]
    after = [_step(rng, rng.choice(_AFTER)) for _ in range(rng.choice([0, 1]))]
    return Net(
        steps=(*before, *middle, *after),
        batch=rng.choice([2, 1, 3, 8]),
        channels=rng.choice([3, 3, 3, 1, 4]),
        size=(rng.choice(_SIZES), rng.choice(_SIZES)),
        dtype=dtype,
    )


_SIZES = (4, 4, 3, 5, 6, 8)
_MIDDLE = (
    *["LAYERS", "SHAPING", "NUMBERS"] * 6,
    *["CONSTANTS", "PAIRS", "PREPARING"] * 3,
    *["ODD", "ODD", "READING"],
)
_AFTER = (*["ENDS"] * 9, "NO_TENSOR")


def _step(rng: random.Random, table: str) -> Step:
    names = PAIRS if table == "PAIRS" else PLAIN.get(table) or MADE[table]
    step = Step(table, rng.choice(list(names)), source=rng.choice([0, 0, 0, 0, 0, 1, 2]))
    return replace(step, other=rng.choice([1, 1, 0, 2, 3])) if table == "PAIRS" else step
