"""Small random nets that torch.fx can trace, each made from a description that prints as Python.

Every list of steps is a net: a step that does not fit the values before it is left out. So what
hypothesis shrinks stays a net, and a failing one can be pasted into a test as it is printed.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

Values = list[Tensor]  # the image and the result of each step so far, each (B, C, H, W)

MOST_ELEMENTS = 40_000  # of a value of one image
CLASSES = 5

# Where a name ends in _ the operation writes over its first operand.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.relu": torch.relu,
    "functional": functional.relu,
    "method": lambda x: x.relu(),
    "functional_": partial(functional.relu, inplace=True),
    "method_": lambda x: x.relu_(),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "roll": lambda x: x.roll(1, 1),
    "shift": lambda x: x.roll(1, 3),
    "slice": lambda x: x[:, :, 1:, :-1],
    "half": lambda x: x.chunk(2, 1)[-1],
    "shuffle": lambda x: functional.channel_shuffle(x, 4),
    "border": lambda x: functional.pad(x, (0, 1, 2, 0, 1, 0)),
    "border of ones": lambda x: functional.pad(x, (1, 0), value=1.0),
    "reflected": lambda x: functional.pad(x, (1, 2, 2, 1), "reflect"),
    "every other": lambda x: x[:, ::2, ::2, 1::2],
    "larger": lambda x: functional.interpolate(x, scale_factor=2.0),
    "times": lambda x: x * 0.5,
    "by": lambda x: x / 3,
    "minus": lambda x: x - 0.25,
    "from": lambda x: 1 - x,
    "gelu": functional.gelu,
    "smooth": lambda x: functional.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "pixel norm": lambda x: functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(
        0, 3, 1, 2
    ),
    "pixel shuffle": lambda x: functional.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "own norm": lambda x: functional.layer_norm(x, x.shape[1:]),
}
ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU_": partial(nn.ReLU, inplace=True),
    "ReLU6": nn.ReLU6,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish_": partial(nn.Hardswish, inplace=True),
    "LeakyReLU": partial(nn.LeakyReLU, 0.1),
    "LeakyReLU_": partial(nn.LeakyReLU, -0.5, inplace=True),
    "Identity": nn.Identity,
    "Dropout": nn.Dropout,
}
SUMS: dict[str, Callable[[Any, Any], Tensor]] = {
    "+": operator.add,
    "swapped": lambda a, b: b + a,
    "torch.add": torch.add,
    "alpha": lambda a, b: torch.add(a, b, alpha=2),
    "swapped alpha": lambda a, b: torch.add(b, a, alpha=-0.5),
    "method": lambda a, b: a.add(b),
    "method alpha": lambda a, b: a.add(b, alpha=3),
    "other=": lambda a, b: torch.add(a, other=b),
    "input=": lambda a, b: torch.add(input=a, other=b),
    "-": operator.sub,
    "swapped -": lambda a, b: b - a,
    "+=_": operator.iadd,
    "add_": lambda a, b: a.add_(b),
    "add_ alpha_": lambda a, b: a.add_(b, alpha=2),
}


class Call(nn.Module):
    """`function` of one value, or of several; a module among them is called like a function."""

    def __init__(self, function: Callable[..., Tensor], *indices: int) -> None:
        super().__init__()
        self.function, self.indices = function, indices

    def forward(self, values: Values) -> Tensor:
        return self.function(*(values[index] for index in self.indices))


class FunctionalConv(nn.Module):
    """A convolution whose module is not called: only its weight and bias are read."""

    def __init__(self, conv: nn.Conv2d, index: int) -> None:
        super().__init__()
        self.conv, self.index = conv, index

    def forward(self, values: Values) -> Tensor:
        conv, x = self.conv, values[self.index]
        options: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return functional.conv2d(x, conv.weight, conv.bias, *options)


class Term(nn.Module):
    """The sum of a value and a parameter or buffer, or what a convolution makes of a parameter."""

    def __init__(self, index: int, shape: Sequence[int], how: str, conv: nn.Module | None) -> None:
        super().__init__()
        self.index, self.how, self.conv = index, how, conv
        self.term = nn.Parameter(torch.empty(tuple(shape)))

    def forward(self, values: Values) -> Tensor:
        term = self.term if self.conv is None else self.conv(self.term)
        return SUMS[self.how](values[self.index], term)


@dataclass(frozen=True, repr=False)
class Described:
    """Prints as the call that makes it, with what differs from the defaults."""

    def __repr__(self) -> str:
        entries = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        given = [f"{name}={value!r}" for name, value, default in entries if value != default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Step(Described):
    """What reads the value that is `source` before the last one."""

    source: int = 0

    def index(self, values: Values) -> int:
        return len(values) - 1 - self.source % len(values)

    def second(self, values: Values, other: int) -> int:
        """The value with this one's size that is `other` before the last such one."""
        size = values[self.index(values)].shape
        alike = [index for index, value in enumerate(values) if value.shape == size]
        return alike[-1 - other % len(alike)]

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        """A module that is called with all values so far; raises ValueError where none fits."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Conv(Step):
    """`width` None: as many channels as come in. `groups` None: depthwise."""

    width: int | None = None
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    mode: str = "zeros"
    dilation: int | tuple[int, int] = 1
    groups: int | None = 1
    bias: bool = False
    functional: bool = False

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        index = self.index(values)
        channels = values[index].shape[1]
        groups, mode = channels if self.groups is None else self.groups, cast(Any, self.mode)
        options = self.kernel, self.stride, self.padding, self.dilation, groups, self.bias, mode
        conv = nn.Conv2d(channels, self.width or channels, *options)
        return FunctionalConv(conv, index) if self.functional else Call(conv, index)


@dataclass(frozen=True, repr=False)
class Norm(Step):
    """Batch norm; with the batch's own statistics where it tracks none."""

    affine: bool = True
    tracked: bool = True

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        _, channels, height, width = values[self.index(values)].shape
        if not self.tracked and height * width < 16:
            raise ValueError("too few pixels to divide by what they differ by")
        norm = nn.BatchNorm2d(channels, affine=self.affine, track_running_stats=self.tracked)
        return Call(norm, self.index(values))


@dataclass(frozen=True, repr=False)
class GroupNorm(Step):
    """Of `groups` groups; None: of a channel each."""

    groups: int | None = 1
    affine: bool = True

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        _, channels, height, width = values[self.index(values)].shape
        groups = channels if self.groups is None else self.groups
        if channels // groups * height * width < 16:
            raise ValueError("too few numbers to divide by what they differ by")
        return Call(nn.GroupNorm(groups, channels, affine=self.affine), self.index(values))


@dataclass(frozen=True, repr=False)
class Activate(Step):
    """A key of ACTIVATIONS or ACTIVATION_MODULES."""

    how: str = "ReLU"

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        _refuse_image(self.how, values, self.index(values))
        if self.how in ACTIVATIONS:
            return Call(ACTIVATIONS[self.how], self.index(values))
        return Call(ACTIVATION_MODULES[self.how](), self.index(values))


@dataclass(frozen=True, repr=False)
class MaxPool(Step):
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] | None = 2
    padding: int | tuple[int, int] = 1
    dilation: int = 1
    ceil_mode: bool = False
    how: str = "module"

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        indices, index = self.how == "indices", self.index(values)
        sizes: Any = (self.kernel, self.stride, self.padding)
        options: Any = (self.dilation, indices, self.ceil_mode)
        pool = nn.MaxPool2d(*sizes, *options)
        if self.how == "functional":
            called: Any = functional.max_pool2d
            dilation, ceil_mode = self.dilation, self.ceil_mode
            return Call(lambda x: called(x, *sizes, dilation, ceil_mode=ceil_mode), index)
        return FirstOf(pool, index) if indices else Call(pool, index)


class FirstOf(nn.Module):
    """The first of several results of `module`."""

    def __init__(self, module: nn.Module, index: int) -> None:
        super().__init__()
        self.module, self.index = module, index

    def forward(self, values: Values) -> Tensor:
        return self.module(values[self.index])[0]


@dataclass(frozen=True, repr=False)
class AveragePool(Step):
    kernel: int | tuple[int, int] = 2
    stride: int | None = None
    padding: int = 0
    ceil_mode: bool = False
    include_pad: bool = True

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        options: Any = (self.kernel, self.stride, self.padding, self.ceil_mode, self.include_pad)
        return Call(nn.AvgPool2d(*options), self.index(values))


@dataclass(frozen=True, repr=False)
class AdaptivePool(Step):
    size: int | tuple[int | None, int | None] = 2
    largest: bool = False

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        kind = nn.AdaptiveMaxPool2d if self.largest else nn.AdaptiveAvgPool2d
        return Call(kind(self.size), self.index(values))


@dataclass(frozen=True, repr=False)
class Sum(Step):
    """A key of SUMS, with an earlier value; with itself where `other` says so."""

    how: str = "+"
    other: int = 1

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        first, second = self.index(values), self.second(values, self.other)
        _refuse_image(self.how, values, first)
        if first == second and self.how in ("-", "swapped -"):
            raise ValueError("nothing is left")
        return Call(SUMS[self.how], first, second)


@dataclass(frozen=True, repr=False)
class SumWith(Step):
    """A key of SUMS, with a number, a parameter, or a convolution of a parameter."""

    how: str = "+"
    what: str = "channel"

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        index = self.index(values)
        _refuse_image(self.how, values, index)
        if self.what == "number":
            if self.how in ("swapped alpha", "other=", "input="):
                raise ValueError("these take no number")
            add = SUMS[self.how]
            return Call(lambda x: add(x, 0.5), index)
        shape = values[index].shape[1:]
        channels = shape[0]
        conv = nn.Conv2d(channels, channels, 3, padding=1) if self.what == "conv" else None
        shapes: dict[str, Sequence[int]] = {
            "channel": (1, channels, 1, 1),
            "flat": (channels, 1, 1),
            "full": shape,
            "row": shape[-1:],
            "scalar": (),
            "conv": (1, *shape),
        }
        return Term(index, shapes[self.what], self.how, conv)


@dataclass(frozen=True, repr=False)
class Concat(Step):
    """Beside an earlier value of the same size."""

    other: int = 1

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        indices = self.index(values), self.second(values, self.other)
        return Call(lambda *parts: torch.cat(parts, 1), *indices)


class Squeeze(nn.Module):
    """Squeeze and excitation (Hu and others, arXiv 1709.01507)."""

    def __init__(self, channels: int, between: int, index: int, swapped: bool) -> None:
        super().__init__()
        self.index, self.swapped, self.pool = index, swapped, nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, between, 1), nn.Conv2d(between, channels, 1)

    def forward(self, values: Values) -> Tensor:
        x = values[self.index]
        factors = self.up(self.down(self.pool(x)).relu()).sigmoid()
        return factors * x if self.swapped else x * factors


@dataclass(frozen=True, repr=False)
class Excite(Step):
    """Squeeze and excitation, with so many channels between."""

    between: int = 4
    swapped: bool = False

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        index = self.index(values)
        return Squeeze(values[index].shape[1], self.between, index, self.swapped)


@dataclass(frozen=True, repr=False)
class Again(Step):
    """What an earlier module makes of this value; `tied`: a copy of it with the same weight."""

    layer_before: int = 0
    tied: bool = False

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        shared = [
            layer.function
            for layer in layers
            if isinstance(layer, Call) and isinstance(layer.function, nn.Module)
        ]
        if not shared:
            raise ValueError("no module comes before")
        module = shared[-1 - self.layer_before % len(shared)]
        _refuse_image("_" if getattr(module, "inplace", False) else "", values, self.index(values))
        if self.tied:
            if type(module) is not nn.Conv2d:
                raise ValueError("only a convolution has a weight to tie")
            module = _tied(module)
        return Call(module, self.index(values))


@dataclass(frozen=True, repr=False)
class Unused(Step):
    """A convolution that nothing calls."""

    def layer(self, values: Values, layers: Sequence[nn.Module]) -> nn.Module:
        layer = Call(lambda x: x, len(values) - 1)
        layer.add_module("unused", nn.Conv2d(32, 32, 3))
        return layer


@dataclass(frozen=True, repr=False)
class Net(Described):
    """Steps on images `(B, 3, *size)`, and a head that makes logits of the last value."""

    steps: tuple[Step, ...] = ()
    size: tuple[int, int] = (8, 8)
    head: str = "pool"
    bias: bool = True


class RandomNet(nn.Module):
    """The module of a description: images `(B, 3, H, W)` -> logits `(B, CLASSES)`."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        values: Values = [torch.zeros(2, 3, *net.size)]
        layers: list[nn.Module] = []
        for step in net.steps:
            made = _fitting(step, values, layers)
            if made is not None:
                layers.append(made[0])
                values.append(made[1])
        self.layers, self.head = nn.ModuleList(layers), HEADS[net.head](values[-1], net.bias)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(values))
        return self.head(values[-1])


class PoolHead(nn.Sequential):
    def __init__(self, value: Tensor, bias: bool) -> None:
        linear = nn.Linear(value.shape[1], CLASSES, bias)
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


class TorchFlattenHead(nn.Module):
    """As ResNet has it."""

    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(value.shape[1], CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


class MeanHead(nn.Module):
    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(value.shape[1], CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class FlattenHead(nn.Module):
    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(value[0].numel(), CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class TwiceHead(nn.Module):
    """One linear layer on the mean and on the maximum, and one on its own result."""

    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(value.shape[1], CLASSES, bias)
        self.square = nn.Linear(CLASSES, CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.fc(torch.flatten(self.pool(x), 1)) + self.fc(x.amax((2, 3)))
        return self.square(self.square(mean))


class PooledTwiceHead(nn.Module):
    """The pooled image is read by the linear layer and by something else."""

    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(value.shape[1], CLASSES, bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.flatten(self.pool(x), 1)
        return self.fc(flat) + flat.mean(1, keepdim=True)


class LayersHead(nn.Sequential):
    """As AlexNet, VGG and MobileNet-V3 have it: linear layers, and what stands between them."""

    def __init__(self, value: Tensor, bias: bool) -> None:
        first, second = nn.Linear(value[0].numel(), 9, bias), nn.Linear(9, 33, bias)
        between = (nn.BatchNorm1d(9), nn.ReLU(inplace=True), nn.Dropout())
        last = (nn.Hardswish(), nn.Linear(33, CLASSES, bias))
        super().__init__(nn.SiLU(), nn.Flatten(), first, *between, second, *last)


class ConvHead(nn.Module):
    """No linear layer: a convolution for each class."""

    def __init__(self, value: Tensor, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(value.shape[1], CLASSES, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


HEADS: dict[str, Callable[[Tensor, bool], nn.Module]] = {
    "pool": TorchFlattenHead,
    "sequential": PoolHead,
    "mean": MeanHead,
    "flatten": FlattenHead,
    "twice": TwiceHead,
    "pooled twice": PooledTwiceHead,
    "conv": ConvHead,
    "layers": LayersHead,
}


def models(net: Net, count: int, dtype: torch.dtype) -> list[nn.Module]:
    """Eval-mode models of a net, each with its own weights and batch statistics."""
    made: list[nn.Module] = []
    for seed in range(count):
        model = RandomNet(net).eval().requires_grad_(False)
        _fill(model, torch.Generator().manual_seed(seed))
        made.append(model.to(dtype))
    return made


def nets() -> st.SearchStrategy[Net]:
    """Nets of a few steps, simplest first."""
    image = st.integers(5, 20)
    return st.builds(
        Net,
        steps=st.lists(_steps(), min_size=1, max_size=7).map(tuple),
        size=st.tuples(image, image),
        head=st.sampled_from(list(HEADS)),
        bias=st.booleans(),
    )


_SOURCES = st.sampled_from([0, 0, 0, 0, 1, 2])
_OTHERS = st.sampled_from([1, 1, 0, 2, 3])
_FLAGS = st.sampled_from([False, False, True])


def _steps() -> st.SearchStrategy[Step]:
    plain, conv = _convolutions()
    activations = ["ReLU", "functional", *ACTIVATION_MODULES, *ACTIVATIONS]
    activate = st.builds(Activate, source=_SOURCES, how=st.sampled_from(activations))
    norm = st.builds(
        Norm,
        source=_SOURCES,
        affine=st.sampled_from([True, True, False]),
        tracked=st.sampled_from([True] * 9 + [False]),
    )
    sums = st.sampled_from(["+", *SUMS])
    added = st.builds(Sum, source=_SOURCES, how=sums, other=_OTHERS)
    constants = ["channel", "flat", "full", "row", "scalar", "conv", "number"]
    constant = st.builds(SumWith, source=_SOURCES, how=sums, what=st.sampled_from(constants))
    again = st.builds(Again, source=_SOURCES, layer_before=st.integers(0, 3), tied=_FLAGS)
    concat = st.builds(Concat, source=_SOURCES, other=_OTHERS)
    often = [plain, conv, norm, activate, added]
    grouped = st.builds(
        GroupNorm, source=_SOURCES, groups=st.sampled_from([1, 4, 8, 3, None]), affine=st.booleans()
    )
    excite = st.builds(
        Excite, source=_SOURCES, between=st.sampled_from([4, 8, 20]), swapped=st.booleans()
    )
    rare = [*_poolings(), grouped, constant, again, concat, excite, st.builds(Unused)]
    return st.one_of(*often, *often, conv, *rare)


def _convolutions() -> tuple[st.SearchStrategy[Step], st.SearchStrategy[Step]]:
    """Such as most nets have, and all that torch can do."""
    two = st.tuples(st.integers(1, 3), st.integers(1, 3))
    plain = st.builds(
        Conv,
        source=_SOURCES,
        width=st.sampled_from([32, None, 64]),
        stride=st.sampled_from([1, 1, 2]),
        bias=_FLAGS,
    )
    conv = st.builds(
        Conv,
        source=_SOURCES,
        width=st.sampled_from([32, None, 64, 32, 8, 24, 16, 96, 5, 40]),
        kernel=st.sampled_from([3, 1, 3, 5, 2, 7]) | two,
        stride=st.sampled_from([1, 1, 2, 3]) | two,
        padding=st.sampled_from([1, 0, 2, "same", "valid", (1, 0), (0, 2), 3]),
        mode=st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]),
        dilation=st.sampled_from([1, 1, 1, 2, (1, 2), (2, 1)]),
        groups=st.sampled_from([1, 1, 1, 2, None, 8, 4, 3]),
        bias=st.booleans(),
        functional=st.sampled_from([False, False, False, True]),
    )
    return plain, conv


def _poolings() -> list[st.SearchStrategy[Step]]:
    largest = st.builds(
        MaxPool,
        source=_SOURCES,
        kernel=st.sampled_from([3, 2, (2, 3), (3, 1)]),
        stride=st.sampled_from([2, None, 1, (1, 2)]),
        padding=st.sampled_from([1, 0, (0, 1)]),
        dilation=st.sampled_from([1, 1, 2]),
        ceil_mode=_FLAGS,
        how=st.sampled_from(["module", "module", "functional", "indices"]),
    )
    average = st.builds(
        AveragePool,
        source=_SOURCES,
        kernel=st.sampled_from([2, 3, (2, 1)]),
        stride=st.sampled_from([None, 1, 2]),
        padding=st.sampled_from([0, 1]),
        ceil_mode=_FLAGS,
        include_pad=st.booleans(),
    )
    adaptive = st.builds(
        AdaptivePool,
        source=_SOURCES,
        size=st.sampled_from([2, 1, 3, (1, 1), (2, 3), (None, 2)]),
        largest=_FLAGS,
    )
    return [largest, average, adaptive]


def _tied(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution like it, without a bias, that has the very same weight."""
    options: Any = {
        name: getattr(conv, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    copy = nn.Conv2d(conv.in_channels, conv.out_channels, bias=False, **options)
    copy.weight = conv.weight
    return copy


def _refuse_image(how: str, values: Values, index: int) -> None:
    """A net that writes over its own image changes what its caller holds: none does."""
    memory = values[index].untyped_storage().data_ptr()
    if how.endswith("_") and memory == values[0].untyped_storage().data_ptr():
        raise ValueError("it would write over the image")


def _fitting(
    step: Step, values: Values, layers: Sequence[nn.Module]
) -> tuple[nn.Module, Tensor] | None:
    """The layer of a step and its result on blank images; None where it fits nothing."""
    try:
        layer = step.layer(values, layers).eval().requires_grad_(False)
        result = layer(values)
    except (ValueError, RuntimeError):  # torch says by either that sizes do not fit
        return None
    return (layer, result) if 0 < result[0].numel() <= MOST_ELEMENTS else None


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep values at about 1, and statistics that are not those of a new norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for scale in (module.running_var, module.weight):
                _ = scale is not None and scale.uniform_(0.5, 2, generator=generator)
            for shift in (module.running_mean, module.bias):
                _ = shift is not None and shift.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            module.weight.uniform_(0.5, 2, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            module.weight.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            _ = module.bias is not None and module.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(module, Term):
            module.term.normal_(generator=generator)
