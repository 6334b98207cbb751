"""What networks put between convolutions becomes one program, with torch's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("numba")

from ensemble.compiler.pipeline import CompiledForward, compile_vmapped
from ensemble.compiler.runtime.program import Program
from tests.unet import trained

CHANNELS = 24


class Between(nn.Module):
    """A layer between two convolutions."""

    def __init__(self, layer: nn.Module, out_channels: int = CHANNELS) -> None:
        super().__init__()
        self.before = nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.layer, self.after = layer, nn.Conv2d(out_channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compiled(make: Callable[[], nn.Module], x: Tensor) -> CompiledForward:
    """Of two models whose numbers are checked against float64."""
    torch.manual_seed(0)
    models = trained(make, 2)
    with torch.no_grad():
        found = compile_vmapped(models, x, threads=1)
        result = found.forward(x)
        exact = torch.stack([model.double()(x.double()) for model in models])
    assert result.shape == exact.shape
    assert float((result - exact).abs().max() / exact.abs().max()) < 2e-6
    return found


def assert_one_program(found: CompiledForward) -> None:
    programs = [module for module in found.forward.modules() if isinstance(module, Program)]
    assert (len(programs), dict(found.by_torch)) == (1, {})


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, *(size or (9, 10)), generator=generator)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "dilation", "groups"),
    [
        (2, 2, 0, 0, 1, 1),  # of a U-Net
        (4, 2, 1, 0, 1, 1),
        (3, 2, 1, 1, 1, 1),
        (3, 2, 0, 0, 1, 1),
        (5, 3, 2, 1, 1, 2),
        (3, 1, 1, 0, 2, 1),
        (4, 4, 0, 0, 1, CHANNELS),
        (2, 3, 0, 0, 1, 1),  # with outputs that nothing reaches
        (3, 2, 4, 1, 2, 4),  # that cuts off rows of the input
        ((3, 2), (1, 2), (2, 0), (0, 1), 1, 1),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_is_a_convolution_and_a_shuffle(
    kernel: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: int,
    groups: int,
    bias: bool,
) -> None:
    options = kernel, stride, padding, output_padding, groups, bias, dilation

    def make() -> nn.Module:
        layer = nn.ConvTranspose2d(CHANNELS, 48, *options)
        return Between(nn.Sequential(layer, nn.BatchNorm2d(48), nn.ReLU()), 48)

    found = compiled(make, images())
    assert_one_program(found)
    labels = [step.kind.label for step in found.steps]
    assert labels.count("pixel shuffle") == 1
    assert ("batch norm" in labels) == (groups > 1)  # else its filters absorb it


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "bilinear"},
        {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"size": (5, 23), "mode": "bilinear"},
        {"size": (1, 1), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 2},
        {"size": (13, 7), "mode": "nearest-exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize("inference", [True, False])
def test_upsampling_stays_in_the_program(options: dict[str, Any], inference: bool) -> None:
    resized = Function(lambda x: functional.interpolate(x, **options))
    with torch.inference_mode(inference):
        assert_one_program(compiled(lambda: Between(resized), images()))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Tanh,
        nn.GELU,
        lambda: nn.GELU("tanh"),
        lambda: nn.InstanceNorm2d(CHANNELS),
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        lambda: nn.GroupNorm(3, CHANNELS, affine=False),
        lambda: Function(lambda x: 1 * x + 0),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_activations_and_norms_stay_in_the_program(
    layer: Callable[[], nn.Module], count: int
) -> None:
    assert_one_program(compiled(lambda: Between(layer()), images()[:count]))


def test_torchs_pixel_shuffle_stays_in_the_program() -> None:
    assert_one_program(compiled(lambda: Between(nn.PixelShuffle(2), CHANNELS // 4), images()))


class ChannelAttention(nn.Module):
    """Efficient channel attention, as in timm's `EcaModule`."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).view(len(x), 1, -1)).sigmoid()
        return x * gate.view(len(x), -1, 1, 1).expand_as(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_a_convolution_over_channels_stays_in_the_program(bias: bool, count: int) -> None:
    found = compiled(lambda: Between(ChannelAttention(bias)), images()[:count])
    assert_one_program(found)
    assert "convolution over channels" in [step.kind.label for step in found.steps]


class Block(nn.Module):
    """A ConvNeXt block (Liu and others, arXiv 2201.03545), channels last but for its first."""

    def __init__(self, scale_last: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS, eps=1e-6)
        self.expand, self.project = nn.Linear(CHANNELS, 50), nn.Linear(50, CHANNELS, bias=False)
        self.scale, self.scale_last = nn.Parameter(torch.rand(CHANNELS)), scale_last

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.project(functional.gelu(self.expand(y)))
        if self.scale_last:
            return x + (self.scale * y).permute(0, 3, 1, 2)
        return x + y.permute(0, 3, 1, 2) * self.scale.view(1, -1, 1, 1)


@pytest.mark.parametrize("scale_last", [True, False])
def test_channels_last_blocks_become_convolutions_of_images(scale_last: bool) -> None:
    found = compiled(lambda: Between(Block(scale_last)), images())
    assert_one_program(found)
    labels = [step.kind.label for step in found.steps]
    assert labels.count("layer norm") == 1
    assert len(labels) == 6  # gelu, scale and shortcut are part of convolutions


def test_what_else_reads_a_channels_last_tensor_gets_it_permuted() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            last = self.norm(x.permute(0, 2, 3, 1))
            cumulated = last.cumsum(1)  # has no kernel
            return (self.linear(last) + cumulated).permute(0, 3, 1, 2)

    found = compiled(lambda: Between(Mixed()), images())
    assert "cumsum" in found.by_torch


class Branches(nn.Module):
    """Parallel convolutions of one input, summed, as RepVGG and MobileOne train them."""

    def __init__(self, groups: int, stride: int) -> None:
        super().__init__()
        of: Any = {"stride": stride, "groups": groups}
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(CHANNELS, CHANNELS, 1, **of, bias=False),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, **of),
                nn.Conv2d(CHANNELS, CHANNELS, (3, 5), padding=(1, 2), **of),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(4))
        self.has_identity = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        total = self.norms[0](self.convs[0](x))
        total = total + (self.norms[3](x) if self.has_identity else 0)
        for conv, norm in zip(self.convs[1:], self.norms[1:3], strict=True):
            total = total + norm(conv(x))
        return total.relu()


@pytest.mark.parametrize("groups", [1, 3, CHANNELS])
@pytest.mark.parametrize("stride", [1, 2])
def test_summed_convolutions_of_one_input_become_one(groups: int, stride: int) -> None:
    found = compiled(lambda: Between(Branches(groups, stride)), images())
    assert_one_program(found)
    assert len(found.steps) == 3


def test_convolutions_that_differ_in_stride_or_alignment_are_not_merged() -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2)
            self.other = nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1)
            self.dilated = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=2, dilation=2)
            self.shifted = nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=(0, 2))

        def forward(self, x: Tensor) -> Tensor:
            shifted = self.shifted(x[..., :-2])
            return self.one(x) + self.other(x) + self.dilated(x)[..., :5, :5] + shifted[..., :1, :1]

    found = compiled(lambda: Between(Unequal()), images(10, 10))
    assert [step.kind.label for step in found.steps].count("direct") >= 4


def test_narrow_intermediate_images_do_not_end_the_program() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 3, 3))

    assert_one_program(compiled(make, images()))
